"""The guidance scale as an input of the student: LCM's embedding, silent at the start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import NATIVE_SCALE, Condition
from fewstep.models.denoiser import NetworkDenoiser, freeze
from fewstep.models.graft import WIDTH
from fewstep.models.lora import Adapters

GUIDANCE = "guidance"


def with_guidance_input(denoiser: NetworkDenoiser, scales: tuple[float, float]) -> NetworkDenoiser:
    """The same network with weights of its own and an input for guidance scales, which it does not hear until trained.

    UNet2DConditionModel has such an input, which stock pipelines feed; every other class is given one beside its time.

    Args:
        denoiser: the student so far.
        scales: the range of scales that it will be trained for.

    Raises:
        UserError: its weights are shared by adapters, or there is no place for an input.
    """
    from diffusers import UNet2DConditionModel

    if denoiser.adapters.names:
        raise UserError("method.guidance_range: a new input needs weights of the student's own; leave out student.lora")
    native = isinstance(denoiser.network, UNet2DConditionModel)
    return replace(_native(denoiser) if native else denoiser.with_scalar(GUIDANCE), guidance_range=scales)


def _native(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """With a zero `cond_proj`: diffusers draws it at random, and a student then does not start from its teacher."""
    from diffusers import UNet2DConditionModel

    assert isinstance(denoiser.network, UNet2DConditionModel)
    if denoiser.network.config["time_cond_proj_dim"] is not None:
        return denoiser
    config: dict[str, Any] = {**denoiser.network.config, "time_cond_proj_dim": WIDTH}
    network = UNet2DConditionModel.from_config(config, time_cond_proj_dim=WIDTH)
    assert isinstance(network, UNet2DConditionModel)
    projection = network.time_embedding.cond_proj
    assert isinstance(projection, nn.Linear)
    nn.init.zeros_(projection.weight)
    network.load_state_dict({**denoiser.network.state_dict(), "time_embedding.cond_proj.weight": projection.weight})
    moved = replace(denoiser, network=freeze(network), adapters=Adapters(network))
    return moved.to(next(denoiser.network.parameters()).device)


def with_guidance(condition: Condition, scale: Tensor, denoiser: NetworkDenoiser) -> Condition:
    """The condition with guidance scales `(B,)` in the form that the network hears.

    diffusers' pipelines embed w = s − 1 as sines and cosines of 1000·w; in float32, where neighbouring scales differ.
    An added input takes s itself, whose sinusoid is smooth enough for scales between those of training.
    """
    if GUIDANCE in denoiser.graft.names:
        return condition.with_scalar(GUIDANCE, scale)
    projection = denoiser.network.get_submodule("time_embedding.cond_proj")
    assert isinstance(projection, nn.Linear)
    told = _embedding(scale.float() - 1, projection.in_features)
    return Condition({**condition.batched, NATIVE_SCALE: told}, condition.shared)


def _embedding(w: Tensor, width: int) -> Tensor:
    half = width // 2
    exponents = torch.arange(half, device=w.device, dtype=torch.float32) * (
        -torch.log(torch.tensor(10000.0)) / (half - 1)
    )
    angles = 1000.0 * w[:, None] * exponents.exp()[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True, eq=False)
class AtScale:
    """A student at one of the guidance scales that it was trained for."""

    student: NetworkDenoiser
    scale: float

    @property
    def process(self) -> Process:
        """The student's."""
        return self.student.process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction at `x_t` `(B, *)` and times `t` `(B,)`."""
        scale = torch.full((len(x_t),), self.scale, device=x_t.device)
        return self.student(x_t, t, with_guidance(condition, scale, self.student))


def at_scale(student: NetworkDenoiser, scale: float | None = None) -> Denoiser:
    """The student at that guidance scale, by default the middle of its range; itself where it takes none.

    Raises:
        UserError: the scale is outside the range that the student was trained for.
    """
    if student.guidance_range is None:
        return student
    low, high = student.guidance_range
    if scale is not None and not low <= scale <= high:
        raise UserError(f"guidance: {scale:g} given; this student was trained for scales from {low:g} to {high:g}")
    return AtScale(student, middle(student.guidance_range) if scale is None else scale)


def middle(scales: tuple[float, float]) -> float:
    """The scale that a student with such a range is sampled at where none is asked for."""
    return sum(scales) / 2
