"""A scheduler for Sana-Sprint's pipeline that keeps a student's steps.

That pipeline tells its network flow matching's times, and its scheduler TrigFlow's. diffusers' `SCMScheduler` always
draws fresh noise between steps, and the pipeline can place the second of two, no more. This one is named by an export
only where that does not serve, because it must be installed with fewstep where the export is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks for it here, to know how the class is loaded
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_scm import SCMSchedulerOutput
from torch import Tensor

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import TrigFlow
from fewstep.models.schedule import Schedule

from .fixed_steps import FixedSteps, KeepsItsSteps, check_falling


def angle(t: float) -> float:
    """TrigFlow's time of the noise level that flow matching calls t."""
    return math.atan2(t, 1 - t)


class SCMGridScheduler(KeepsItsSteps):
    """Steps of x_t = cos(t)·x_0 + sin(t)·ε at fixed times, by the ODE or with fresh noise (Lu & Song 2025, "sCM").

    Args:
        times: start times of the steps as flow matching calls them, falling from 1, where the pipeline starts; the last
            step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following time, or the ODE's first-order step is taken.
        seed: of that noise where the pipeline hands no generator over; `manual_seed` changes it.
        sigma_data: what the pipeline multiplies its samples with while they are in the scheduler's hands.
        prediction_type: "trigflow".
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        times: Sequence[float] = (1.0,),
        renoise: bool = False,
        seed: int = 0,
        sigma_data: float = 1.0,
        prediction_type: str = "trigflow",
    ) -> None:
        check_falling("times", times, 0, 1)
        schedule = Schedule(TrigFlow(sigma_data), Kind.VELOCITY)
        self._steps = FixedSteps(schedule, [angle(t) for t in times], renoise, seed)
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
    ) -> None:
        """Begin a sampling. The steps are those of the config, whatever the pipeline says about their times.

        Raises:
            ValueError: another number of steps is asked for.
        """
        self._steps.begin(num_inference_steps, None if timesteps is None else timesteps[:-1])
        told = self._steps.told(device)
        self.timesteps, self.num_inference_steps = torch.cat([told, told.new_zeros(1)]), len(told)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The state `(B, *)` at the next time, and x̂_0, from the velocity `(B, *)` at this one."""
        prediction = self._steps.predicted(model_output, sample)
        x0 = prediction.x0.to(model_output.dtype)
        x = self._steps.onward(prediction, generator).to(model_output.dtype)
        return SCMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)
