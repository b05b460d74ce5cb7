"""What the schedulers here with fixed steps have in common: their place in the list, and the noise between steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.solvers import jump
from fewstep.models.families import scheduler_time
from fewstep.models.schedule import Schedule

ROUNDED = 1e-6
"""How far beyond its ends, relatively, a time may lie: grids are made of powers of roots."""


class FixedSteps:
    """A student's steps, taken as fewstep's own sampler takes them.

    Args:
        schedule: the process that the steps live on, and what the network predicts there.
        times: start times of the steps in the process's own time, noise end first; the last step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following time (consistency models, DMD2), or the ODE's
            first-order step is taken.
        seed: of that noise where the pipeline hands no generator over.
    """

    def __init__(self, schedule: Schedule, times: Sequence[float], renoise: bool, seed: int) -> None:
        self.times = tuple(float(t) for t in times)
        self.seed = seed
        self._schedule, self._renoise = schedule, renoise
        self.begin(None)

    def begin(self, asked: int | None, *lists: Sequence[float] | None) -> None:
        """Start a sampling. A list that the pipeline makes up only has its length.

        Raises:
            ValueError: another number of steps is asked for.
        """
        told = next((len(one) for one in lists if one is not None), asked)
        if told not in (None, len(self.times)):
            raise ValueError(
                f"num_inference_steps: {told} given; this student was made for {len(self.times)}, at {list(self.times)}"
            )
        self.at = 0
        self._generator = torch.Generator().manual_seed(self.seed)

    def told(self, device: torch.device | str | None) -> Tensor:
        """What the network is told of the times `(n,)`, in float32."""
        return scheduler_time(self._schedule.process, torch.tensor(self.times, dtype=torch.float32)).to(device)

    def network_input(self, x: Tensor) -> Tensor:
        """What the network is given of the state `x` `(B, *)`."""
        wrapping = self._schedule.preconditioning
        return x if wrapping is None else wrapping.scaled(x, self._now(x))

    def step(self, output: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The state `(B, *)` at the next time, from the network's output at this one, in float32 in between."""
        return self.onward(self.predicted(output, x), generator).to(output.dtype)

    def predicted(self, output: Tensor, x: Tensor) -> Prediction:
        """What the network's output `(B, *)` at the state `x` says."""
        wrapping, t = self._schedule.preconditioning, self._now(x)
        value = output if wrapping is None else wrapping.x0(x, t, output)
        return Prediction(self._schedule.process, x, t, value, self._schedule.kind)

    def onward(self, prediction: Prediction, generator: torch.Generator | None) -> Tensor:
        """The state `(B, *)` at the next time, which is then the present one."""
        self.at += 1
        if self.at == len(self.times):
            return prediction.x0
        s = self._now(prediction.x_t)
        if not self._renoise:
            return jump(prediction, s)
        return self._schedule.process.add_noise(prediction.x0, self._noise(prediction.x0, generator), s)

    def _now(self, like: Tensor) -> Tensor:
        return self._schedule.process.times(self.times[self.at], like)

    def _noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return randn_tensor(like.shape, generator=generator or self._generator, device=like.device, dtype=like.dtype)


class KeepsItsSteps(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers whose steps are `FixedSteps`; what it is told of them is for those that inherit it."""

    order = 1
    _steps: FixedSteps

    def manual_seed(self, seed: int) -> None:
        """Draw the noise between steps from another seed, from the next sampling on."""
        self._steps.seed = seed

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a sampling starts; pipelines say 0."""
        self._steps.at = begin_index


class GridScheduler(KeepsItsSteps):
    """One that is called as most of diffusers' schedulers are."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Begin a sampling. The steps are those of the config: a list that the pipeline makes up only has its length.

        Raises:
            ValueError: another number of steps is asked for.
        """
        self._steps.begin(num_inference_steps, timesteps, sigmas)
        self.timesteps, self.num_inference_steps = self._steps.told(device), len(self._steps.times)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given: the sample `(B, *)`, times c_in at the present step where it is preconditioned."""
        return self._steps.network_input(sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state `(B, *)` at the next time, from the network's output `(B, *)` at this one."""
        x = self._steps.step(model_output, sample, generator)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


def check_falling(name: str, times: Sequence[Any], low: float, high: float) -> None:
    """Raise a ValueError unless the times fall and lie in [low, high]."""
    if not times or any(b >= a for a, b in pairwise(times)) or not _within(times, low, high):
        raise ValueError(f"{name}: {list(times)} given; numbers that fall, from {high:g} down to {low:g}, are needed")


def _within(times: Sequence[float], low: float, high: float) -> bool:
    return low * (1 - ROUNDED) <= times[-1] <= times[0] <= high * (1 + ROUNDED)
