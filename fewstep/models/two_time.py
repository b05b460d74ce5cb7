"""Two-time students: networks that are told where a jump ends, and say the average velocity of the way there.

Everything here lives on flow matching's path, x_t = (1 − t)·x_0 + t·ε, whatever process the network was made for, and
t is where a jump starts, the noisier end, r where it ends. The trajectory through x at t passes x + (r − t)·u(x, t, r)
at r, and u(x, t, t) is the ODE's own velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fewstep.diffusion.process import Flow, Process, expand
from fewstep.diffusion.solvers import Denoiser
from fewstep.diffusion.times import Law, TimePair, ordered
from fewstep.diffusion.view import viewed
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser

UNIT = 10.0
"""Radians of the fastest wave that embeds a span of 1. The next ones turn by 10/10^(4k/n), so that short and long
spans look different, while the embedding's derivative is 100 times smaller than diffusers' 1000·t would make it: that
derivative is trained by LSD and stands in the targets of ESD and MeanFlow."""


def two_time(student: NetworkDenoiser) -> NetworkDenoiser:
    """The student with an input for the span t − r, which it does not hear until trained: then it is its teacher.

    A student that has the input already is taken as it is.

    Raises:
        UserError: there is no place for an input.
    """
    if SPAN in student.graft.names:
        return student
    return student.with_scalar(SPAN, UNIT)


@dataclass(frozen=True, eq=False)
class TwoTime:
    """A two-time denoiser, of any process, as the average velocity of flow matching's path.

    Attributes:
        denoiser: on `Flow`; made by `TwoTime.of`.
    """

    denoiser: Denoiser

    @staticmethod
    def of(denoiser: Denoiser) -> TwoTime:
        """The average velocity that `denoiser`, of any process, means."""
        return TwoTime(viewed(denoiser, Flow()))

    def velocity(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """u(x, t, r) `(B, *)`, from `x` `(B, *)` at flow times `t` to `r` `(B,)`; differentiable in all three."""
        return self.denoiser(x, t, condition.with_scalar(SPAN, t - r)).velocity

    def jump(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """X_{t→r}(x) = x + (r − t)·u(x, t, r), `(B, *)`."""
        return advance(x, t, r, self.velocity(x, t, r, condition))


def advance(x: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> Tensor:
    """Where `velocity` `(B, *)` leads from `x` `(B, *)` at times `t` to `r` `(B,)`: x + (r − t)·u."""
    return x + expand(r - t, x).to(x) * velocity


def noise_end(process: Process) -> float:
    """The flow time at which samplers of `process` start: of equal signal-to-noise ratio, 1 or close to it."""
    t_max = torch.tensor(process.t_max, dtype=torch.float64)
    return float(Flow().time_at(process.ratio(t_max)))


@dataclass(frozen=True)
class WithAtom:
    """A law of times of which a share is one and the same time, such as the noise end, where every sampler starts.

    Attributes:
        law: of the others.
        share: of the one time, from 0 to below 1.
        time: that one.
    """

    law: Law
    share: float
    time: float

    def __call__(self, u: Tensor) -> Tensor:
        """The times that the uniforms `u` pick."""
        rest = ((u - self.share) / (1 - self.share)).clamp_min(0)
        return self.law(rest).masked_fill(u < self.share, self.time)


@dataclass(frozen=True)
class Parts:
    """Rows of a batch, `(n,)` int64 each, which together are all of it.

    Attributes:
        diagonal: where t = r.
        jumps: where t > r.
    """

    diagonal: Tensor
    jumps: Tensor


@dataclass(frozen=True)
class SpanLaw:
    """Pairs (t, r) of which a share is the diagonal t = r, where an average velocity is learnt as flow matching is.

    The diagonal's rows are spread evenly over the batch, the same at every step: sub-batches keep their sizes, and
    processes that share a batch share it out alike, if the rows of each are a multiple of the pattern's length.

    Attributes:
        law: of t on the diagonal, and of the two ends, independent and then sorted, elsewhere.
        diagonal: share of the batch.
    """

    law: Law
    diagonal: float

    def parts(self, batch: int, device: torch.device | str = "cpu") -> Parts:
        """Which rows are which."""
        return _parts(batch, self.diagonal, torch.device(device))

    def pairs(self, one: Tensor, other: Tensor) -> TimePair:
        """Times t and r = `s`, all `(B,)`, from two independent uniforms `(B,)` for each row."""
        first = self.law(one)
        both, jumps = ordered(first, self.law(other)), torch.zeros(len(one), dtype=torch.bool, device=one.device)
        jumps[self.parts(len(one), one.device).jumps] = True
        return TimePair(torch.where(jumps, both.t, first), torch.where(jumps, both.s, first))


@cache
def _parts(batch: int, share: float, device: torch.device) -> Parts:
    """Row i is diagonal where ⌊(i + 1)·share⌋ > ⌊i·share⌋."""
    steps = (torch.arange(batch + 1, dtype=torch.float64) * share + 1e-9).floor()
    diagonal = steps.diff() > 0
    return Parts(diagonal.nonzero()[:, 0].to(device), (~diagonal).nonzero()[:, 0].to(device))
