"""Guidance distillation: one evaluation that says what a guided teacher says in two."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform
from fewstep.errors import UserError
from fewstep.losses.guidance import GuidanceWeight, guided_regression
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import with_guidance, with_guidance_input
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Range
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class GuidanceConfig(MethodConfig):
    """Settings of guidance distillation."""

    guidance_range: Range | None = (1.0, 5.0)
    """Range of guidance scales s, drawn per sample and given to the network as an input; the paper's w from 0 to 4 is
    s = 1 + w from 1 to 5. None: `teacher.guidance` alone, and the network stays as it is."""
    noise_end: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples trained at the process's noise end itself, where every sampler takes its first and most guided
    step; 0 is the paper's uniform law of times."""
    weight: GuidanceWeight = "output"
    """Weight of the error by noise level: `output` takes it in the network's own parametrisation, `snr_plus_one` and
    `truncated_snr` are those of progressive distillation."""


class GuidanceDistillation(Method):
    """Regress a guided teacher's prediction, at every guidance scale of a range, in one evaluation.

    L = E[ω(λ_t)·‖x̂_θ(x_t, t, c, s) − sg[x̂_∅ + s·(x̂_c − x̂_∅)]‖²] over noised data and uniform scales s = 1 + w: the
    paper's first stage (section 3.1). Any few-step method may be the second.
    """

    Config: ClassVar[type[MethodConfig]] = GuidanceConfig
    family = "guidance"
    paper = "Meng et al. 2023, On Distillation of Guided Diffusion Models, arXiv 2210.03142"
    few_step = False
    claims = Claims(steps=(4, 8), one_student=True, guided=True)

    def __init__(self, config: GuidanceConfig, setup: Setup) -> None:
        assert setup.guided is not None
        _check(config, setup.guided)
        self.config, self.guided = config, setup.guided
        scales = config.guidance_range
        self.student = with_guidance_input(setup.student, scales) if scales is not None else setup.student
        self.law = Uniform(self.student.process)
        self.players, self.averages = {"student": Player(self.student.parameters())}, {}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The regression at one random time and scale a sample."""
        t, noise = self._times(rng.uniform(len(batch.x))), rng.normal(batch.x)
        x_t = self.student.process.add_noise(batch.x, noise, t)
        scale = self._scale(rng, len(batch.x))
        guided = self.guided if scale is None else self.guided.at(scale)
        condition = batch.condition if scale is None else with_guidance(batch.condition, scale, self.student)
        with torch.no_grad():
            target = guided(x_t, t, batch.condition)
        return Terms({"regression": guided_regression(self.student(x_t, t, condition), target, self.config.weight)})

    def _scale(self, rng: Rng, batch: int) -> Tensor | None:
        """One guidance scale a sample, uniform in the configured range."""
        if self.config.guidance_range is None:
            return None
        low, high = self.config.guidance_range
        return low + (high - low) * rng.uniform(batch)

    def _times(self, u: Tensor) -> Tensor:
        """Uniform times and, for the highest of the uniforms `u` `(B,)`, the noise end."""
        return self.law((u / (1 - self.config.noise_end)).clamp_max(1))

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The teacher's own deterministic sampler: DDIM on the trailing grid."""
        return Sampler(process.step_list(steps), "ddim")


def _check(config: GuidanceConfig, guided: Guided) -> None:
    """The scales have one place, and the teacher has a reference that they lead away from."""
    if guided.null is None and guided.weak is None:
        raise UserError("teacher: guidance comes from a conditional teacher, and this one takes no condition")
    given = guided.scale
    if config.guidance_range is not None and given != 1.0:
        raise UserError(
            f"teacher.guidance: {given} given, but method.guidance_range draws the scales; leave one out (null)"
        )
    if config.guidance_range is None and not isinstance(given, float):
        raise UserError("teacher.guidance: a range is given; as method.guidance_range the network hears the scale")
    if config.guidance_range is None and given == 1.0:
        raise UserError("teacher.guidance: 1 is off; give the scale to learn, or method.guidance_range")
