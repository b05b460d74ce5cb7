"""A flow-matching scheduler that keeps a student's steps, whatever its pipeline says about them.

diffusers' own flow schedulers cannot store a list of steps: the pipeline must be told `sigmas` at every call, and some
pipelines take none. This one is named by an export only where none of them serves, because it must be installed with
fewstep where the export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FlowGridScheduler(SchedulerMixin, ConfigMixin):
    """Steps of x_t = (1 − t)·x_0 + t·ε at fixed times, by the ODE or with fresh noise.

    Args:
        sigmas: start times of the steps, falling, in (0, 1]; the last step lands on clean data.
        renoise: whether x̂_0 is noised afresh at each following time (consistency models, DMD2), or the ODE's Euler step
            is taken.
        seed: of that noise where the pipeline hands no generator over; `manual_seed` changes it.
        num_train_timesteps: what a time of 1 is called.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float] = (1.0,),
        renoise: bool = False,
        seed: int = 0,
        num_train_timesteps: int = 1000,
    ) -> None:
        if not sigmas or not all(1 >= a > b for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            raise ValueError(
                f"sigmas: {list(sigmas)} given; numbers that fall from 1 or below and stay above 0 are needed"
            )
        self._seed = seed
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a sampling. The steps are those of the config: a list that the pipeline makes up only has its length.

        Raises:
            ValueError: another number of steps is asked for.
        """
        own = [float(sigma) for sigma in self.config["sigmas"]]
        lists = [len(one) for one in (sigmas, timesteps) if one is not None]
        asked = lists[0] if lists else num_inference_steps
        if asked not in (None, len(own)):
            raise ValueError(f"num_inference_steps: {asked} given; this student was made for {len(own)}, at {own}")
        self.sigmas = torch.tensor([*own, 0.0], dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config["num_train_timesteps"]).to(device)
        self.num_inference_steps = len(own)
        self._at = 0
        self._generator = torch.Generator().manual_seed(self._seed)

    def manual_seed(self, seed: int) -> None:
        """Draw the noise between steps from another seed, from the next sampling on."""
        self._seed = seed

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a sampling starts; pipelines say 0."""
        self._at = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state `(B, *)` at the next time, from the velocity `(B, *)` at this one, in float32 in between."""
        here, there = self.sigmas[self._at].item(), self.sigmas[self._at + 1].item()
        x, velocity = sample.float(), model_output.float()
        if self.config["renoise"]:
            x = (1 - there) * (x - here * velocity)
            x = x + there * self._noise(x, generator) if there else x
        else:
            x = x + (there - here) * velocity
        self._at += 1
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return randn_tensor(like.shape, generator=generator or self._generator, device=like.device, dtype=like.dtype)
