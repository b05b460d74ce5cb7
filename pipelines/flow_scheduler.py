"""A flow-matching scheduler that keeps a student's steps, whatever its pipeline says about them.

diffusers' own flow schedulers cannot store a list of steps: the pipeline must be told `sigmas` at every call, and some
pipelines take none. This one is named by an export only where none of them serves, because it must be installed with
fewstep where the export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks for it here, to know how the class is loaded
from diffusers.configuration_utils import register_to_config

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.schedule import Schedule

from .fixed_steps import FixedSteps, GridScheduler, check_falling


class FlowGridScheduler(GridScheduler):
    """Steps of x_t = (1 − t)·x_0 + t·ε at fixed times, by the ODE or with fresh noise.

    Args:
        sigmas: start times of the steps, falling, in [0, 1]; the last step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following time (consistency models, DMD2), or the ODE's Euler step
            is taken.
        seed: of that noise where the pipeline hands no generator over; `manual_seed` changes it.
        num_train_timesteps: what a time of 1 is called.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float] = (1.0,),
        renoise: bool = False,
        seed: int = 0,
        num_train_timesteps: int = 1000,
    ) -> None:
        check_falling("sigmas", sigmas, 0, 1)
        schedule = Schedule(Flow(timesteps=num_train_timesteps), Kind.VELOCITY)
        self._steps = FixedSteps(schedule, sigmas, renoise, seed)
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a sampling. The steps are those of the config: a list that the pipeline makes up only has its length.

        Raises:
            ValueError: another number of steps is asked for.
        """
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas)
        self.sigmas = torch.tensor([*self._steps.times, 0.0], dtype=torch.float32)
