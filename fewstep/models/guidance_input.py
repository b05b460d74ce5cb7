"""The guidance scale as an input of the student: LCM's embedding, silent at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import GuidanceInput
from fewstep.models.lora import BASE

GUIDANCE = "guidance"


def with_guidance_input(denoiser: NetworkDenoiser, scales: tuple[float, float]) -> NetworkDenoiser:
    """The same network with an input for guidance scales, which it does not hear until trained.

    An input that is there is kept. One of its class, which stock pipelines feed, is added where its pipelines look for
    it; every other network is given one beside its time. Weights are the student's own, or those of an adapter's view,
    which trains the input beside its adapter.

    Args:
        denoiser: the student so far.
        scales: the range of scales that it will be trained for.

    Raises:
        UserError: there is no place for an input.
    """
    place = denoiser.family.guidance
    denoiser = replace(denoiser, fixed=Condition())
    if own_input(denoiser) is None and GUIDANCE not in denoiser.graft.names:
        add = None if place is None else place.add
        denoiser = denoiser.with_scalar(GUIDANCE) if add is None else _with_layers(denoiser, add)
    return replace(denoiser, guidance_range=scales)


def own_input(denoiser: NetworkDenoiser) -> GuidanceInput | None:
    """The input for a guidance scale that the network's class has; None where it was made without."""
    return denoiser.family.own_guidance(_config(denoiser))


def _config(denoiser: NetworkDenoiser) -> Mapping[str, Any]:
    return getattr(denoiser.network, "config", {})


def _with_layers(denoiser: NetworkDenoiser, add: Callable[[nn.Module], str]) -> NetworkDenoiser:
    """With weights of its own for the input, as `with_scalar`."""
    grown = denoiser.copy() if denoiser.adapter == BASE else denoiser
    part = add(grown.network)
    return grown if denoiser.adapter == BASE else grown.owning(part)


def with_guidance(condition: Condition, scale: Tensor, denoiser: NetworkDenoiser) -> Condition:
    """The condition with guidance scales `(B,)` in the form that the network hears.

    diffusers' pipelines embed w = s − 1 as sines and cosines of 1000·w for UNets, in float32, where neighbouring scales
    differ; other classes are told s. An added input takes s itself, whose sinusoid is smooth enough for scales between
    those of training.
    """
    own = None if GUIDANCE in denoiser.graft.names else own_input(denoiser)
    if own is None:
        return condition.with_scalar(GUIDANCE, scale)
    width, told = _config(denoiser)[own.config], scale.float()
    if not isinstance(width, bool):
        told = _embedding(told - 1, width)
    if own.scale is not None:
        told = told * _config(denoiser)[own.scale]
    return Condition({**condition.batched, own.argument: told}, condition.shared)


def settled(denoiser: NetworkDenoiser, scale: float) -> NetworkDenoiser:
    """A denoiser that takes guidance scales, told this one whatever else is asked of it."""
    return replace(denoiser, fixed=with_guidance(Condition.none(), torch.tensor([scale]), denoiser)).to(
        next(denoiser.network.parameters()).device
    )


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


def check_within(scales: tuple[float, float], taken: tuple[float, float]) -> None:
    """Whether a teacher takes all scales of a method's range.

    Raises:
        UserError: it does not.
    """
    if not taken[0] <= scales[0] <= scales[1] <= taken[1]:
        raise UserError(f"method.guidance_range: [{scales[0]:g}, {scales[1]:g}] given; the teacher takes scales from "
                        f"{taken[0]:g} to {taken[1]:g}")  # fmt: skip


def middle(scales: tuple[float, float]) -> float:
    """The scale that a student with such a range is sampled at where none is asked for."""
    return sum(scales) / 2
