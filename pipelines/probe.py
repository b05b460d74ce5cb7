"""One sampling, told both to fewstep's sampler and to a stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import with_guidance

from .recipes import Recipe

TOKENS = 77


@dataclass(frozen=True)
class Probe:
    """The same noise and condition in both languages.

    Attributes:
        noise: `(B, *)` unit noise.
        condition: what fewstep's denoiser is told.
        tensors: the pipeline's arguments that are tensors.
        call: its other arguments.
        generator: state of the generator to hand to the pipeline.
        after: state of that generator once the noise is drawn; what re-noising goes on from.
    """

    noise: Tensor
    condition: Condition
    tensors: Mapping[str, Tensor]
    call: Mapping[str, Any]
    generator: Tensor
    after: Tensor

    def renoising(self) -> torch.Generator:
        """The generator of the fresh noise between steps."""
        generator = torch.Generator()
        generator.set_state(self.after)
        return generator


@dataclass(frozen=True)
class _Told:
    condition: Condition
    tensors: Mapping[str, Tensor]
    call: Mapping[str, Any]


def probe_of(student: NetworkDenoiser, recipe: Recipe, call: Mapping[str, Any], batch: int, seed: int) -> Probe:
    """Noise and condition of `batch` samples from `seed`, for the arguments `call` of the recipe's pipeline.

    Raises:
        UserError: the network's sample size is not one number.
    """
    config: Any = getattr(student.network, "config", {})
    side, channels = config["sample_size"], config["in_channels"]
    if not isinstance(side, int):
        raise UserError(f"export: sample_size {side!r} of the network; the check needs one whole number")
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    noise = torch.randn(batch, channels, side, side, generator=generator)
    scale = torch.full((batch,), float(call.get("guidance_scale", 1.0)))
    told = _told(student, scale, torch.Generator().manual_seed(seed + 1))
    # ConsistencyModelPipeline refuses latents of any but three channels.
    given = recipe.latents and (recipe.pipeline != "ConsistencyModelPipeline" or channels == 3)
    after = generator.get_state()
    tensors = {**told.tensors, **({"latents": noise} if given else {})}
    size = {"batch_size": batch} if recipe.sized else {}
    words = {**recipe.raw, **call, **size, **told.call}
    return Probe(noise, told.condition, tensors, words, after if given else before, after)


def _told(student: NetworkDenoiser, scale: Tensor, generator: torch.Generator) -> _Told:
    """The condition: first classes, made-up text embeddings, or nothing; the scale `(B,)` where there is an input."""
    batch = len(scale)
    config: Any = getattr(student.network, "config", {})
    match type(student.network).__name__:
        case "UNet2DConditionModel":
            text = torch.randn(batch, TOKENS, config["cross_attention_dim"], generator=generator)
            condition = Condition({"encoder_hidden_states": text})
            if config["time_cond_proj_dim"] is not None:
                condition = with_guidance(condition, scale, student)
            return _Told(condition, {"prompt_embeds": text}, {})
        case "SD3Transformer2DModel":
            text = torch.randn(batch, TOKENS, config["joint_attention_dim"], generator=generator)
            pooled = torch.randn(batch, config["pooled_projection_dim"], generator=generator)
            condition = Condition({"encoder_hidden_states": text, "pooled_projections": pooled})
            return _Told(condition, {"prompt_embeds": text, "pooled_prompt_embeds": pooled}, {})
    return _classes(student, batch)


def _classes(student: NetworkDenoiser, batch: int) -> _Told:
    if student.null is None or student.null.labels is None:
        return _Told(Condition.none(), {}, {})
    labels = torch.arange(batch) % int(student.null.labels)
    return _Told(Condition.of_labels(labels), {}, {"class_labels": labels.tolist()})
