"""Adapter guidance distillation: the guided teacher in one evaluation, by small adapters on its frozen weights."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler, TeacherSolver
from fewstep.models.adapter_guidance import guidance_adapters, with_adapters
from fewstep.models.guided_trajectory import along_trajectories
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Range
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class AGDConfig(MethodConfig):
    """Settings of adapter guidance distillation."""

    guidance_range: Range = (1.0, 6.0)
    """Range of guidance scales, one drawn for each trajectory and told to the student; the paper's is 1 to 6 (DiT) and
    1 to 12 (Stable Diffusion)."""
    rank: int = Field(default=16, ge=1)
    """Hidden units of each adapter. 16 with `width` 32 add 1.9 % to the embedded teacher; the paper adds 1 to 5 %."""
    width: int = Field(default=32, ge=1)
    """Width of the embedding of scale, time and condition that the adapters share."""
    trajectory_steps: int = Field(default=16, ge=1)
    """Solver steps of a training trajectory, on which each of `trajectory_steps` + 1 states is a sample; the paper
    stores trajectories of 1,000."""
    solver: TeacherSolver = "ddim"
    """The teacher's step from one state to the next."""
    loss: Literal["l2", "l1"] = "l2"
    """Distance of the two predictions, in the student's own parametrisation."""


class AGD(Method):
    """Predict with one evaluation what the guided teacher predicts with two, along its own guided trajectories.

    L = E ‖ε_{ψ+η}(x_t, t, c, s) − sg[ε_ψ(x_t, t, ∅) + s·(ε_ψ(x_t, t, c) − ε_ψ(x_t, t, ∅))]‖² over the states x_t of
    the teacher's ODE under scale s (section 3); the teacher's weights ψ are frozen, only the adapters η learn.
    """

    Config: ClassVar[type[MethodConfig]] = AGDConfig
    family = "guidance"
    paper = "Jensen and Sadat 2025, Efficient Distillation of Classifier-Free Guidance using Adapters, arXiv 2503.07274"
    claims = Claims(steps=(4, 8), one_student=True, guided=True)

    def __init__(self, config: AGDConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.guided = config, setup.guided.ranged(config.guidance_range)
        self.student = with_adapters(setup.student, config.guidance_range, setup.example, config.rank, config.width)
        adapters = guidance_adapters(self.student)
        self.share = torch.tensor(adapters.share_of(self.student.network))
        self.players, self.averages = {"student": Player.of(adapters)}, {}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The distance of the two predictions at about as many states as the batch has samples."""
        taught = along_trajectories(self.guided, batch, self.config.trajectory_steps, self.config.solver, rng)
        gap = taught.gap(self.student)
        loss = gap.square().mean() if self.config.loss == "l2" else gap.abs().mean()
        return Terms({"guidance": loss}, {"parameter_share": self.share})

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The teacher's own solver on its own times: a student of guidance is a teacher at half the price."""
        return Sampler(process.step_list(steps), "ddim")
