"""The proof of a family: our denoiser says what the pipeline hands to its scheduler's `step`, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.process import EDM, Flow
from fewstep.models.capture import Capture
from fewstep.models.conditioning import Condition
from fewstep.models.load import make_denoiser, schedule_of_network
from fewstep.models.schedule import schedule_of


@dataclass(frozen=True)
class Step:
    """What a pipeline gives its scheduler at one step.

    Attributes:
        prediction: `(B, *)`.
        timestep: a number.
        x: `(B, *)` the sample, as the scheduler holds it.
        scaled: the sample as the network is given it; of some schedulers that is another.
        sigma: of the scheduler's table at this step; None where it has none.
    """

    prediction: Tensor
    timestep: Tensor
    x: Tensor
    scaled: Tensor
    sigma: Tensor | None


@dataclass(frozen=True)
class Comparison:
    """What pipeline and denoiser say at one step, `(B, *)` both."""

    pipeline: Tensor
    ours: Tensor

    @property
    def difference(self) -> float:
        """The largest, over all numbers."""
        return float((self.pipeline - self.ours).abs().max())


def steps_of(pipeline: Any, call: Mapping[str, Any]) -> list[Step]:
    """What reaches `scheduler.step` while the pipeline is called."""
    scheduler, found = pipeline.scheduler, []
    process = schedule_of(_config(scheduler)).process
    own, is_flow, tabled = scheduler.step, isinstance(process, Flow), isinstance(process, Flow | EDM)

    def step(prediction: Tensor, timestep: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = scheduler.sigmas[len(found)].clone() if tabled else None
        scaled = x if is_flow else scheduler.scale_model_input(x, timestep)
        found.append(Step(prediction.clone(), torch.as_tensor(timestep).clone(), x.clone(), scaled.clone(), sigma))
        return own(prediction, timestep, x, *args, **kwargs)

    scheduler.step = step
    try:
        pipeline(**call)
    finally:
        del scheduler.step
    return found


def _config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@torch.no_grad()
def contract(pipeline: Any, prompts: Sequence[str] | Sequence[int] | None, **call: Any) -> list[Comparison]:
    """Pipeline and denoiser at both steps of an unguided call of two; of an EDM scheduler, the x̂_0 that it makes.

    Args:
        pipeline: of diffusers.
        prompts: or class labels; None for pipelines that take neither.
        call: further arguments of the pipeline's call.
    """
    capture = Capture(pipeline, call)
    denoiser = make_denoiser(capture.network, schedule_of_network(capture.network, _config(pipeline.scheduler)))
    condition = Condition.none() if prompts is None else capture.prompts(prompts)
    words = capture.words(prompts, num_inference_steps=2)
    said = steps_of(pipeline, words)
    if denoiser.preconditioning is not None:
        x0 = pipeline.scheduler.precondition_outputs
        return [Comparison(x0(step.x, step.prediction, step.sigma), denoiser(step.x, time, condition).value)
                for step in said for time in [_time(denoiser.process, step)]]  # fmt: skip
    return [Comparison(step.prediction, denoiser(step.scaled, _time(denoiser.process, step), condition).value)
            for step in said]  # fmt: skip


def _time(process: Any, step: Step) -> Tensor:
    """The time `(B,)` of a step: the scheduler's σ, unless it rounds its timesteps."""
    t = step.timestep.float()
    if step.sigma is not None and isinstance(process, EDM):
        t = step.sigma
    if step.sigma is not None and isinstance(process, Flow):
        t = step.sigma if bool(step.sigma * process.timesteps == t) else t / process.timesteps
    return t.expand(len(step.x))
