"""A scheduler of EDM-preconditioned networks that keeps a student's steps, and can noise them afresh.

diffusers' own ones take the ODE's steps on one family of grids. This one is named by an export only where they do not
serve, because it must be installed with fewstep where the export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fewstep.models.schedule import schedule_of

from .fixed_steps import FixedSteps, check_falling


class EDMGridScheduler(SchedulerMixin, ConfigMixin):
    """Steps of x_σ = x_0 + σ·ε at fixed σ, by the ODE or with fresh noise (Karras et al. 2022).

    What is not named here is told as in diffusers' `EDMEulerScheduler`, and means the same.

    Args:
        times: σ at the start of each step, falling; the last step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following σ (consistency models, DMD2), or Euler's step is taken.
        seed: of that noise where the pipeline hands no generator over; `manual_seed` changes it.
        sigma_data: standard deviation of the data.
        sigma_min: the smallest σ that the network knows.
        sigma_max: the largest.
        rho: of the scale on which steps are even.
        prediction_type: "epsilon", or "v_prediction", whose output has the other sign.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        times: Sequence[float] = (80.0,),
        renoise: bool = False,
        seed: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        prediction_type: str = "epsilon",
    ) -> None:
        check_falling("times", times, sigma_min, sigma_max)
        schedule = schedule_of({**self.config, "_class_name": type(self).__name__})
        self._steps = FixedSteps(schedule, times, renoise, seed)
        self.set_timesteps()

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline scales its first noise by: the first σ."""
        return self._steps.times[0]

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

    def manual_seed(self, seed: int) -> None:
        """Draw the noise between steps from another seed, from the next sampling on."""
        self._steps.seed = seed

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a sampling starts; pipelines say 0."""
        self._steps.at = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample `(B, *)` times c_in at the present step."""
        return self._steps.network_input(sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state `(B, *)` at the next σ, from the network's output `(B, *)` at this one."""
        x = self._steps.step(model_output, sample, generator)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
