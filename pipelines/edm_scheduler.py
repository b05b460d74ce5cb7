"""A scheduler of EDM-preconditioned networks that keeps a student's steps, and can noise them afresh.

diffusers' own ones take the ODE's steps on one family of grids. This one is named by an export only where they do not
serve, because it must be installed with fewstep where the export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks for it here, to know how the class is loaded
from diffusers.configuration_utils import register_to_config

from fewstep.models.schedule import schedule_of

from .fixed_steps import FixedSteps, GridScheduler, check_falling


class EDMGridScheduler(GridScheduler):
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
