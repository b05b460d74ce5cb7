"""Guidance-free training: guidance learned from data alone, by how the conditional prediction is written."""

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
from fewstep.losses.guidance import guidance_free
from fewstep.models.conditioning import Condition
from fewstep.models.guidance_input import with_guidance, with_guidance_input
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Range
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class GFTConfig(MethodConfig):
    """Settings of guidance-free training."""

    guidance_range: Range | None = (1.0, 5.0)
    """Range of guidance scales s = 1/β that the network is given as an input. β is uniform between their inverses, as
    the paper's is from 0 to 1, which has no largest scale; its samples are made at s from 1 to 5. None:
    `teacher.guidance` alone, and the network stays as it is."""
    noise_end: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples trained at the process's noise end itself, where every sampler takes its first and most guided
    step; 0 is the paper's uniform law of times."""
    label_dropout: float = Field(default=0.1, gt=0, lt=1)
    """Share of samples that train the unconditional prediction, at s = 1 (0.1 for the paper's DiT)."""


class GFT(Method):
    """Fit the data by a mixture of the student and its own unconditional prediction: the student is then guided.

    L = E‖β·ε_θ(x_t, t, c, β) + (1 − β)·sg ε_θ(x_t, t, ∅, 1) − ε‖² (Chen et al. 2025, algorithm 1), in the student's own
    parametrisation. Its optimum is the guided prediction at s = 1/β.
    """

    Config: ClassVar[type[MethodConfig]] = GFTConfig
    family = "guidance"
    paper = "Chen et al. 2025, Visual Generation Without Guidance, arXiv 2501.15420"
    needs_teacher = False
    few_step = False
    claims = Claims(steps=(4, 8), one_student=True, guided=True)

    def __init__(self, config: GFTConfig, setup: Setup) -> None:
        if setup.student.null is None:
            raise UserError("student: guidance comes from a conditional network, and this one takes no condition")
        self.config, self.null = config, setup.student.null
        self.low, self.high = _scales(config, setup)
        scales = config.guidance_range
        self.student = with_guidance_input(setup.student, scales) if scales is not None else setup.student
        self.law = Uniform(self.student.process)
        self.players, self.averages = {"student": Player(self.student.parameters())}, {}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The mixture's denoising loss; samples that have lost their condition are trained at s = 1."""
        size = len(batch.x)
        t, noise = self._times(rng.uniform(size)), rng.normal(batch.x)
        x_t = self.student.process.add_noise(batch.x, noise, t)
        beta = 1 / self.high + (1 / self.low - 1 / self.high) * rng.uniform(size)
        dropped = rng.uniform(size) < self.config.label_dropout
        scale = torch.where(dropped, 1.0, 1 / beta)
        null = self.null.expand(size)
        with torch.no_grad():
            base = self.student(x_t, t, self._told(null, torch.ones_like(scale)))
        kept = batch.condition.replaced_where(dropped, null)
        said = self.student(x_t, t, self._told(kept, scale))
        return Terms({"guidance_free": guidance_free(said, base, batch.x, noise, scale)})

    def _told(self, condition: Condition, scale: Tensor) -> Condition:
        """The condition with its scales `(B,)`, where the network takes them."""
        return condition if self.config.guidance_range is None else with_guidance(condition, scale, self.student)

    def _times(self, u: Tensor) -> Tensor:
        """Uniform times and, for the highest of the uniforms `u` `(B,)`, the noise end."""
        return self.law((u / (1 - self.config.noise_end)).clamp_max(1))

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The deterministic sampler of a teacher: DDIM on the trailing grid, without guidance."""
        return Sampler(process.step_list(steps), "ddim")


def _scales(config: GFTConfig, setup: Setup) -> tuple[float, float]:
    """The method's range of scales, or the run's one scale as a range of no width."""
    given = 1.0 if setup.guided is None else setup.guided.scale
    if config.guidance_range is not None:
        if given != 1.0:
            raise UserError(
                f"teacher.guidance: {given} given, but method.guidance_range draws the scales; leave one out (null)"
            )
        if config.guidance_range[0] < 1:
            raise UserError(f"method.guidance_range: starts at {config.guidance_range[0]:g}; s = 1/β starts at 1")
        return config.guidance_range
    if not isinstance(given, float):
        raise UserError("teacher.guidance: a range is given; as method.guidance_range the network hears the scale")
    if not given > 1:
        raise UserError(f"method.guidance_range: missing, and teacher.guidance is {given:g}; give one of them, above 1")
    return given, given
