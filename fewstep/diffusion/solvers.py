"""Steps along the probability-flow ODE, and samplers made of them.

A step takes the prediction at `(x_t, t)` and a target time `s`, `(B,)`, another one for each sample if need be. No
function here decides about gradients: they flow through every step unless the caller says `torch.no_grad()`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, at_least_float32
from fewstep.diffusion.process import Flow, Process, expand
from fewstep.errors import UserError, did_you_mean
from fewstep.models.conditioning import SPAN, Condition

SamplerKind = Literal["renoise", "ddim", "euler", "heun", "dpmpp", "flow_map"]
TeacherSolver = Literal["euler", "heun", "ddim"]


class Denoiser(Protocol):
    """Anything that predicts at `x_t` `(B, *)` and times `t` `(B,)`: a network, a guided one, a closed form."""

    @property
    def process(self) -> Process:
        """What x_t and t mean."""
        ...

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction at `x_t` `(B, *)`, `t` `(B,)`."""
        ...


def jump(prediction: Prediction, s: Tensor | None) -> Tensor:
    """α_s·x̂_0 + σ_s·ε̂, the DDIM step to times `s` `(B,)`; None is clean data, x̂_0 (Song et al. 2021, eq. 12)."""
    if s is None:
        return prediction.x0
    process, x0 = prediction.process, prediction.x0
    return expand(process.alpha(s), x0).to(x0) * x0 + expand(process.sigma(s), x0).to(x0) * prediction.eps


def span(process: Process, t: Tensor, s: Tensor | None) -> Tensor:
    """What a two-time network is told of a jump from times `t` `(B,)` to `s`, or to clean data: its flow time.

    It predicts x̂_0 and ε̂ whose `jump` lands on its trajectory at s, in every process: the average velocity of the
    flow path from t to s (MeanFlow, arXiv 2505.13447; flow maps, arXiv 2505.18825).
    """
    start = Flow().time_at(process.ratio(t))
    return start if s is None else start - Flow().time_at(process.ratio(s))


def euler(prediction: Prediction, s: Tensor) -> Tensor:
    """x_t + (s − t)·dx/dt in the process's own time. On EDM and flow matching it equals `jump`."""
    x = at_least_float32(prediction.x_t)
    return x + expand(s - prediction.t, x).to(x) * prediction.velocity


def heun(denoiser: Denoiser, prediction: Prediction, s: Tensor, condition: Condition) -> Tensor:
    """Heun's step to times `s`: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1).

    Samples whose `s` is clean (σ_s = 0) take the Euler step, because x̂_0 says nothing of the slope there. On VP the
    slope jumps at every index of the table, so that `jump` and `dpmpp` are the better solvers there.
    """
    process, x, t = prediction.process, at_least_float32(prediction.x_t), prediction.t
    first, noisy = euler(prediction, s), process.sigma(s) > 0
    slope = denoiser(first, torch.where(noisy, s, t), condition).velocity
    second = x + expand(s - t, x).to(x) * (prediction.velocity + slope) / 2
    return torch.where(expand(noisy, x), second, first)


def dpmpp(prediction: Prediction, s: Tensor, previous: Prediction | None) -> Tensor:
    """One step of DPM-Solver++(2M) to times `s`, in log(α/σ) (Lu et al. 2022, algorithm 2).

    `previous` is the prediction one step earlier; without one the step is `jump`. Where that was made at pure noise
    (α = 0), the last step was infinitely long in log-SNR, and this one is first order of itself. σ_s must not be 0.
    """
    if previous is None:
        return jump(prediction, s)
    process, t = prediction.process, prediction.t
    here, h = process.ratio(t).log(), process.ratio(t).log() - process.ratio(s).log()
    h_last = process.ratio(previous.t).log() - here
    gain = expand(h / (2 * h_last), prediction.x0).to(prediction.x0)
    x, x0 = at_least_float32(prediction.x_t), prediction.x0 + gain * (prediction.x0 - previous.x0)
    shrink = process.sigma(s) / process.sigma(t)
    grow = process.alpha(s) - shrink * process.alpha(t)  # α_s(1 − e^{−h})
    return expand(shrink, x).to(x) * x + expand(grow, x).to(x) * x0


def teacher_step(
    denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, condition: Condition, solver: TeacherSolver
) -> Tensor:
    """x_s from `x` `(B, *)` at `t` `(B,)` to `s` `(B,)` by one step of `solver`: what consistency methods ask for."""
    return step(denoiser, denoiser(x, t, condition), s, condition, solver)


def step(denoiser: Denoiser, prediction: Prediction, s: Tensor, condition: Condition, solver: TeacherSolver) -> Tensor:
    """x_s from a prediction that `denoiser` has made; only "heun" calls it again."""
    match solver:
        case "ddim":
            return jump(prediction, s)
        case "euler":
            return euler(prediction, s)
        case "heun":
            return heun(denoiser, prediction, s, condition)


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    Attributes:
        times: start times of the steps, noise end first. The last step always lands on clean data, x̂_0.
        kind: what joins two times: fresh noise on x̂_0 ("renoise", the sampler of consistency models and DMD2), or a
            step of "ddim", "euler", "heun" or "dpmpp", or the jump of a two-time network ("flow_map").

    Raises:
        UserError: no times, times that do not decrease, an unknown kind.
    """

    times: tuple[float, ...]
    kind: SamplerKind = "renoise"

    def __post_init__(self) -> None:
        kinds = get_args(SamplerKind)
        if self.kind not in kinds:
            raise UserError(
                f"sampler kind: {self.kind!r} is not one of {', '.join(kinds)}{did_you_mean(self.kind, kinds)}"
            )
        if not self.times or any(b >= a for a, b in zip(self.times, self.times[1:], strict=False)):
            raise UserError(f"sampler times: {list(self.times)} given, at least one and each below the one before")

    @staticmethod
    def of(process: Process, steps: int, kind: SamplerKind = "renoise") -> Sampler:
        """The sampler on the process's own list of `steps` times."""
        return Sampler(process.step_list(steps), kind)

    @staticmethod
    def renoising(process: Process, steps: int, times: tuple[float, ...] | None) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time: of `method.times`, or of the process's own list.

        Raises:
            UserError: another number of times than `steps`.
        """
        if times is not None and len(times) != steps:
            raise UserError(f"method.times: {len(times)} given, student.steps={steps} needs as many")
        return Sampler(times or process.step_list(steps), "renoise")


def trajectory(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    condition: Condition,
    generator: torch.Generator | None = None,
) -> Iterator[Prediction]:
    """The prediction of every step, noise end first; its `x_t`, `t` and `x0` tell the whole trajectory.

    Args:
        denoiser: the network; called once a step, twice for "heun".
        sampler: times and kind.
        noise: `(B, *)` unit noise.
        condition: of batch B.
        generator: of the fresh noise of "renoise", drawn in order, once between two steps.
    """
    process = denoiser.process
    x = process.prior(at_least_float32(noise), sampler.times[0])
    previous = None
    for i, time in enumerate(sampler.times):
        t = process.times(time, x)
        s = process.times(sampler.times[i + 1], x) if i + 1 < len(sampler.times) else None
        told = condition.with_scalar(SPAN, span(process, t, s)) if sampler.kind == "flow_map" else condition
        prediction = denoiser(x, t, told)
        yield prediction
        if s is not None:
            x = _between(denoiser, sampler.kind, prediction, previous, s, condition, generator)
        previous = prediction


def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    condition: Condition,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clean samples `(B, *)` from unit noise `(B, *)`, in at least float32; arguments as for `trajectory`."""
    return deque(trajectory(denoiser, sampler, noise, condition, generator), maxlen=1).pop().x0


def _between(
    denoiser: Denoiser,
    kind: SamplerKind,
    prediction: Prediction,
    previous: Prediction | None,
    s: Tensor,
    condition: Condition,
    generator: torch.Generator | None,
) -> Tensor:
    """x_s, by the sampler's way from one time to the next."""
    match kind:
        case "renoise":
            return prediction.process.add_noise(prediction.x0, _fresh_noise(prediction.x0, generator), s)
        case "dpmpp":
            return dpmpp(prediction, s, previous)
        case "flow_map":
            return jump(prediction, s)
        case "ddim" | "euler" | "heun":
            return step(denoiser, prediction, s, condition, kind)


def _fresh_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the generator's own device, as diffusers does: a CPU seed then gives the same noise everywhere."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
