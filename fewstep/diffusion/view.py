"""A denoiser of one process seen as a denoiser of another: the same noisy sample at equal signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Process, expand, same_process, transfer
from fewstep.diffusion.solvers import Denoiser
from fewstep.models.conditioning import Condition


@dataclass(frozen=True, eq=False)
class View:
    """What `denoiser` predicts, at samples and times of another process: x̂_0 and ε̂ are the same in both.

    So a method that is written in one process (flow maps on flow matching's straight path, continuous consistency on
    TrigFlow's circle) trains a network of any other.
    """

    denoiser: Denoiser
    process: Process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The velocity in this view's own process at `x_t` `(B, *)` and times `t` `(B,)`; differentiable in both."""
        state = transfer(x_t, t, self.process, self.denoiser.process)
        seen = self.denoiser(state.x, state.t, condition)
        d_alpha, d_sigma = (expand(d(t), seen.x0).to(seen.x0) for d in (self.process.d_alpha, self.process.d_sigma))
        return Prediction(self.process, x_t, t, d_alpha * seen.x0 + d_sigma * seen.eps, Kind.VELOCITY)


def viewed(denoiser: Denoiser, process: Process) -> Denoiser:
    """The denoiser on `process`; itself where that is its own."""
    return denoiser if same_process(denoiser.process, process) else View(denoiser, process)
