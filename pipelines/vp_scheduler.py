"""A scheduler on a noise table that keeps a student's steps, whatever its pipeline says about them.

Of diffusers' own schedulers on a table none stores a list of steps, and some pipelines take none. This one is named by
an export only where none of them serves, because it must be installed with fewstep where the export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks for it here, to know how the class is loaded
from diffusers.configuration_utils import register_to_config

from fewstep.models.schedule import schedule_of

from .fixed_steps import FixedSteps, GridScheduler, check_falling


class VPGridScheduler(GridScheduler):
    """Steps of x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε at fixed times, by the ODE or with fresh noise.

    The noise table and the prediction are told as in diffusers' own schedulers, and mean the same.

    Args:
        times: start times of the steps, falling, as indices of the table; between two of its entries log(σ/α) is
            linear. The last step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following time (consistency models, DMD2), or DDIM's step is
            taken.
        seed: of that noise where the pipeline hands no generator over; `manual_seed` changes it.
        prediction_type: "epsilon", "v_prediction" or "sample".
        num_train_timesteps: entries of the table.
        beta_start: the table's first β.
        beta_end: its last.
        beta_schedule: what lies between.
        trained_betas: all β, in place of these three.
        rescale_betas_zero_snr: whether the table is stretched to end at pure noise.
        snr_shift_scale: what CogVideoX divides the table's signal-to-noise ratio by; None: nothing.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        times: Sequence[float] = (999.0,),
        renoise: bool = False,
        seed: int = 0,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
    ) -> None:
        check_falling("times", times, 0, num_train_timesteps - 1)
        schedule = schedule_of({**self.config, "_class_name": type(self).__name__})
        self._steps = FixedSteps(schedule, times, renoise, seed)
        self.set_timesteps()
