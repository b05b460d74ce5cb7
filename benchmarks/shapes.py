"""Networks of the shapes that people train, with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step import CLASSES, unet
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod


@dataclass(frozen=True)
class Shape:
    """One network with what it is told.

    Attributes:
        build: the network, as large as it is, or tiny.
        sample: `(*)` of one sample, as large and tiny.
        condition: of a batch, from its size and whether it is tiny.
        flow: whether it is a flow model; else it predicts ε on a table of 1,000 steps.
        batch: samples that training takes at once.
        lora: rank of the adapters that it is trained by; None trains copies.
    """

    build: Callable[[bool], nn.Module]
    sample: tuple[tuple[int, ...], tuple[int, ...]]
    condition: Callable[[int, bool], Condition]
    flow: bool = False
    batch: int = 8
    lora: int | None = None

    def denoiser(self, tiny: bool, device: torch.device) -> NetworkDenoiser:
        """The frozen teacher, its weights random."""
        torch.manual_seed(0)
        with device:
            network = self.build(tiny)
        schedule = Schedule(Flow(), Kind.VELOCITY) if self.flow else Schedule(_table(), Kind.EPS)
        return make_denoiser(network, schedule).to(device)

    def example(self, size: int, tiny: bool) -> Batch:
        """A batch of random samples on the host."""
        x = torch.randn(size, *self.sample[tiny], generator=torch.Generator().manual_seed(0))
        return Batch(x, self.condition(size, tiny), torch.arange(size))


@dataclass
class Endless:
    """The same batch for ever, as a loader hands it out: what data costs is measured elsewhere."""

    batch: Batch
    position: int = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += len(self.batch.x)
            yield self.batch


def _table() -> VP:
    return VP(alphas_cumprod({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}))


def _sd15(tiny: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(_TINY_UNET if tiny else {"cross_attention_dim": 768}))


_TINY_UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


_SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _sdxl(tiny: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    added = {"addition_embed_type": "text_time", "use_linear_projection": True}
    if tiny:
        return UNet2DConditionModel(
            **_TINY_UNET, **added, addition_time_embed_dim=4, projection_class_embeddings_input_dim=32
        )
    return UNet2DConditionModel(**added, **_SDXL)


def _dit(tiny: bool) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    size: dict[str, Any] = (
        {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
        if tiny
        else {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32}
    )
    return DiTTransformer2DModel(in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=1000, **size)


def _flux(tiny: bool) -> nn.Module:
    """Four double and eight single blocks of FLUX.1's width; all of its 19 and 38 would need several devices."""
    from diffusers import FluxTransformer2DModel

    size: dict[str, Any] = (
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "in_channels": 16,
        }
        if tiny
        else {"num_layers": 4, "num_single_layers": 8}
    )
    return FluxTransformer2DModel(guidance_embeds=False, **size)


def _text(size: int, width: int, length: int = 77) -> Tensor:
    return torch.randn(size, length, width, generator=torch.Generator().manual_seed(1))


def _told_sd15(size: int, tiny: bool) -> Condition:
    return Condition({"encoder_hidden_states": _text(size, 8 if tiny else 768)})


def _told_sdxl(size: int, tiny: bool) -> Condition:
    text = {"encoder_hidden_states": _text(size, 8 if tiny else 2048)}
    pooled = {"added_cond_kwargs.text_embeds": _text(size, 8 if tiny else 1280, 1)[:, 0]}
    return Condition(text | pooled | {"added_cond_kwargs.time_ids": torch.full((size, 6), 8.0)})


def _told_dit(size: int, tiny: bool) -> Condition:
    return Condition.of_labels(torch.arange(size) % 1000)


def _told_flux(size: int, tiny: bool) -> Condition:
    tokens, length = (16, 4) if tiny else (1024, 512)
    text = {
        "encoder_hidden_states": _text(size, 8 if tiny else 4096, length),
        "pooled_projections": _text(size, 8 if tiny else 768, 1)[:, 0],
    }
    return Condition(text, {"img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(length, 3)})


SHAPES: Mapping[str, Shape] = {
    "sd15": Shape(_sd15, ((4, 64, 64), (4, 8, 8)), _told_sd15),
    "sdxl": Shape(_sdxl, ((4, 128, 128), (4, 8, 8)), _told_sdxl, batch=2, lora=32),
    "dit_xl_2": Shape(_dit, ((4, 32, 32), (4, 8, 8)), _told_dit, batch=16),
    "flux_blocks": Shape(_flux, ((1024, 64), (16, 16)), _told_flux, flow=True, batch=2, lora=32),
}

SMALL = Shape(unet, ((3, 32, 32), (3, 32, 32)), lambda size, tiny: Condition.of_labels(torch.arange(size) % CLASSES))
"""A network of 6.8 million parameters for images of 32×32."""
