"""The layers for a guidance scale that a class of diffusers has a place for, put into a network made without them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.models.graft import WIDTH, GraftedEmbedding, ScalarEmbedding, added_embedding
from fewstep.models.lora import without_adapters


def add_to_unet(network: nn.Module) -> str:
    """A zero `cond_proj` for UNet2DConditionModel, in place; diffusers draws it at random.

    Returns:
        a part of the names of the new parameters.
    """
    embedding: Any = network.get_submodule("time_embedding")
    if isinstance(embedding, GraftedEmbedding):
        embedding = embedding.base
    first = embedding.linear_1
    projection = nn.Linear(WIDTH, first.in_features, bias=False).to(first.weight)
    nn.init.zeros_(projection.weight).requires_grad_(first.weight.requires_grad)
    embedding.cond_proj = projection
    _tell_config(network, time_cond_proj_dim=WIDTH)
    return ".cond_proj."


def add_to_flux(network: nn.Module) -> str:
    """A `guidance_embedder` for FluxTransformer2DModel, silent at first, in place.

    Returns:
        a part of the names of the new parameters.
    """
    embedding = network.get_submodule("time_text_embed")
    network.set_submodule("time_text_embed", _TimeGuidanceText(embedding))
    _tell_config(network, guidance_embeds=True)
    return ".guidance_embedder."


class _TimeGuidanceText(nn.Module):
    """Flux's embedding with a guidance scale, its parameters called as in diffusers' class.

    That class must be told a scale. This one need not be, so that the other views on a shared network stay as they are.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.time_proj, self.timestep_embedder = base.time_proj, base.timestep_embedder
        self.text_embedder = base.text_embedder
        plain = base.timestep_embedder
        plain = without_adapters(plain.base if isinstance(plain, GraftedEmbedding) else plain)
        silent = added_embedding(plain, 1.0)
        assert isinstance(silent, ScalarEmbedding)
        self.guidance_embedder = silent.layers

    def forward(self, timestep: Tensor, *told: Tensor) -> Tensor:
        """What is told beside the time: a scale `(B,)` or none, and the pooled text `(B, D)`."""
        *scale, text = told
        out = self.timestep_embedder(self.time_proj(timestep).to(text.dtype))
        for one in scale:
            out = out + self.guidance_embedder(self.time_proj(one).to(text.dtype))
        return out + self.text_embedder(text)


def _tell_config(network: Any, **facts: Any) -> None:
    network.register_to_config(**facts)
