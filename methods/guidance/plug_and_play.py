"""Plug-and-play diffusion distillation: the guided teacher in one evaluation, by an external guide network."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler, TeacherSolver
from fewstep.diffusion.times import Uniform
from fewstep.models.guide_network import guide_for, guide_of, with_guide
from fewstep.models.guided_trajectory import Taught, along_trajectories, at_noised_data
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs, Range
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class PlugAndPlayConfig(MethodConfig):
    """Settings of plug-and-play diffusion distillation."""

    guidance_range: Range = (1.0, 6.0)
    """Range of guidance scales, one drawn for each sample and told to the guide."""
    channels: int = Field(default=16, ge=1)
    """Channels of the guide's own features; 16 with `width` 32 add 1.3 % to the embedded teacher. The paper's small
    guide has 1 % of its teacher's parameters."""
    width: int = Field(default=32, ge=1)
    """Width of the guide's embedding of scale, time and condition."""
    states: Literal["noised_data", "trajectory"] = "noised_data"
    """Where the guide learns: at noised data, as in the paper, or along the teacher's guided trajectories."""
    trajectory_steps: Annotated[int, Needs("states", "trajectory")] = Field(default=8, ge=1)
    """Solver steps of such a trajectory, on which each of `trajectory_steps` + 1 states is a sample."""
    solver: Annotated[TeacherSolver, Needs("states", "trajectory")] = "ddim"
    """The teacher's step from one state to the next."""


class PlugAndPlay(Method):
    """Guide a frozen teacher's decoder by the features of a small network that hears the scale.

    L = E ‖ε_ψ(x_t, t, c; G_η(x_t, t, c, s)) − sg[ε_ψ(x_t, t, ∅) + s·(ε_ψ(x_t, t, c) − ε_ψ(x_t, t, ∅))]‖²; only the
    guide G_η learns, and works on other networks fine-tuned from the same one (section 3).
    """

    Config: ClassVar[type[MethodConfig]] = PlugAndPlayConfig
    family = "guidance"
    paper = "Hsiao et al. 2024, Plug-and-Play Diffusion Distillation, arXiv 2406.01954"
    claims = Claims(steps=(4, 8), one_student=True, guided=True)

    def __init__(self, config: PlugAndPlayConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.guided = config, setup.guided.ranged(config.guidance_range)
        guide = guide_for(setup.student, config.guidance_range, setup.example, config.channels, config.width)
        self.student = with_guide(setup.student, guide)
        guide = guide_of(self.student)
        self.share = torch.tensor(guide.share_of(self.student.network))
        self.players, self.averages = {"student": Player.of(guide)}, {}
        self.times = Uniform(self.student.process)

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The squared distance of the two predictions, in the student's own parametrisation."""
        gap = self._taught(batch, rng).gap(self.student)
        return Terms({"guidance": gap.square().mean()}, {"parameter_share": self.share})

    def _taught(self, batch: Batch, rng: Rng) -> Taught:
        if self.config.states == "noised_data":
            return at_noised_data(self.guided, batch, self.times, rng)
        return along_trajectories(self.guided, batch, self.config.trajectory_steps, self.config.solver, rng)

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The teacher's own solver on its own times: a student of guidance is a teacher at half the price."""
        return Sampler(process.step_list(steps), "ddim")
