"""Guidance of a teacher: x̂ = x̂_ref + s·(x̂ − x̂_ref), where the reference is told less, or is a weaker model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process, expand
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import check_within, with_guidance
from fewstep.rng import Rng

WeakCondition = Literal["same", "unconditional"]


@dataclass(frozen=True)
class Guided:
    """A denoiser under guidance, in the convention that s = 1 is off.

    The reference is the same denoiser under the null condition (classifier-free guidance, Ho & Salimans 2022,
    arXiv 2207.12598) or under a negative one, or a weaker model of the same data (Karras et al. 2024,
    arXiv 2406.02507).

    Attributes:
        denoiser: predicts with and without the condition.
        null: the null condition, of one sample; needed for every scale but 1, unless there is a weak model.
        scale: s, one for all or one a sample `(B,)`, or the range that `drawn` takes one a sample from.
        interval: the noise levels that s applies at, ends included, as fractions of the process's scale
            (`Process.at`); s is 1 at all others (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: at all.
        weak: a model whose prediction is the reference; None: the denoiser itself.
        weak_condition: what the weak model is told: the sample's condition (autoguidance), or what takes the null one's
            place.
        negative: a condition of one sample that guidance leads away from, in place of the null condition.
        hears: the denoiser as a network that takes the scale as an input, by which one evaluation is the guided one;
            None: guidance takes two.

    Raises:
        UserError: a scale other than 1 without a reference.
    """

    denoiser: Denoiser
    null: Condition | None
    scale: float | tuple[float, float] | Tensor = 1.0
    interval: tuple[float, float] | None = None
    weak: Denoiser | None = None
    weak_condition: WeakCondition = "same"
    negative: Condition | None = None
    hears: NetworkDenoiser | None = None

    def __post_init__(self) -> None:
        if self._needs_null() and self._told_less is None and not self._off():
            raise UserError(f"teacher.guidance: {self.scale} needs a conditional teacher; this one takes 1.0 only")

    def _needs_null(self) -> bool:
        return self.hears is None and (self.weak is None or self.weak_condition == "unconditional")

    def _off(self) -> bool:
        return not isinstance(self.scale, Tensor) and self.scale == 1.0

    @property
    def _told_less(self) -> Condition | None:
        return self.null if self.negative is None else self.negative

    @property
    def process(self) -> Process:
        """The denoiser's."""
        return self.denoiser.process

    def at(self, scale: float | Tensor) -> Guided:
        """The same teacher under another scale, or one a sample `(B,)`."""
        return replace(self, scale=scale)

    def ranged(self, scales: tuple[float, float]) -> Guided:
        """The same teacher with the range that a method's own `guidance_range` states.

        Raises:
            UserError: the teacher cannot be guided, or has been given a scale besides.
        """
        if not self._off():
            raise UserError(f"teacher.guidance: {self.scale} given; the scales come from method.guidance_range here")
        if self._needs_null() and self._told_less is None:
            raise UserError("method.guidance_range: guidance comes from a conditional teacher, and this run has none")
        if self.hears is not None and self.hears.guidance_range is not None:
            check_within(scales, self.hears.guidance_range)
        return replace(self, scale=scales)

    def drawn(self, rng: Rng, batch: int) -> Guided:
        """The same teacher, its scales `(B,)` uniform in its range; itself, with nothing drawn, where it has none.

        Draw once for a loss, so that all its evaluations of a sample agree.
        """
        if not isinstance(self.scale, tuple):
            return self
        low, high = self.scale
        return self.at(low + (high - low) * rng.uniform(batch))

    def rows(self, index: Tensor) -> Guided:
        """The teacher of the samples at `index`, with their scales."""
        return self.at(self.scale[index]) if isinstance(self.scale, Tensor) else self

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The guided prediction at `x_t` `(B, *)` and times `t` `(B,)`.

        Guidance is the same in every linear parametrisation, so it acts on the network's own output. Outside the
        interval that is the denoiser's own, to the bit; the reference is then left out only where looking costs
        nothing: on a CPU, in a process alone, for others may wait to gather the reference's weights with it.

        Raises:
            UserError: the scale is a range, and none was drawn from it.
        """
        scale = self._settled()
        inside = self._inside(t)
        if self.hears is not None and not self._off():
            return self.hears(x_t, t, with_guidance(condition, _everywhere(scale, inside, t), self.hears))
        nowhere = inside is not None and _looking_is_free(t) and not bool(inside.any())
        if self._off() or nowhere:
            return self.denoiser(x_t, t, condition)
        out, reference = self._both(x_t, t, condition)
        s = expand(scale, x_t) if isinstance(scale, Tensor) else scale
        value = reference + s * (out.value - reference)
        if inside is not None:
            value = torch.where(expand(inside, value), value, out.value)
        return replace(out, value=value)

    def _settled(self) -> float | Tensor:
        if isinstance(self.scale, tuple):
            low, high = self.scale
            raise UserError(
                f"teacher.guidance: [{low:g}, {high:g}] is a range that training draws a scale a sample from; give a "
                "number here"
            )
        return self.scale

    def _inside(self, t: Tensor) -> Tensor | None:
        """Whether s applies, `(B,)`; None where it does everywhere."""
        if self.interval is None:
            return None
        low, high = (self.process.at(torch.full_like(t[:1].detach(), fraction)) for fraction in self.interval)
        return (t >= low) & (t <= high)

    def _both(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Tensor]:
        """The denoiser's own prediction and the reference `(B, *)` in the same parametrisation."""
        told_less = self._told_less
        if self.weak is not None:
            out = self.denoiser(x_t, t, condition)
            if self.weak_condition == "unconditional":
                assert told_less is not None
                condition = condition.nulled(told_less, len(x_t))
            return out, self.weak(x_t, t, condition).as_kind(out.kind)
        assert told_less is not None
        both = Condition.cat([condition, condition.nulled(told_less, len(x_t))])
        out = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = out.value.chunk(2)
        return Prediction(out.process, x_t, t, conditional, out.kind), unconditional


def _looking_is_free(t: Tensor) -> bool:
    """Whether a value may be read to save an evaluation: no device is waited for, and no other process waits here."""
    alone = not (dist.is_available() and dist.is_initialized())
    return alone and t.device.type == "cpu"


def _everywhere(scale: float | Tensor, inside: Tensor | None, t: Tensor) -> Tensor:
    """The scales `(B,)` that a network is told: outside the interval 1, which is off."""
    told = scale if isinstance(scale, Tensor) else torch.full((len(t),), scale, device=t.device)
    return told if inside is None else torch.where(inside, told, 1.0)
