"""Flow maps: LSD, ESD and PSD, from data alone or from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Flow, Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform
from fewstep.diffusion.view import viewed
from fewstep.errors import UserError
from fewstep.losses.flow_map import eulerian, lagrangian, mean_square, progressive
from fewstep.models.conditioning import Condition
from fewstep.models.players import Player
from fewstep.models.two_time import SpanLaw, TwoTime, WithAtom, noise_end, two_time
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class FlowMapConfig(MethodConfig):
    """Settings of flow maps; the defaults distil a teacher by the kind that the paper finds best."""

    kind: Literal["lsd", "esd", "psd"] = "lsd"
    """What the map must satisfy: that its end moves along the ODE (Lagrangian; the paper's best), that its end stays
    while its start moves (Eulerian; the paper finds it unstable), or that one jump is two (progressive)."""
    teacher: bool = True
    """Whether the velocities are a teacher's (flow map matching), or those of the data and of the student itself."""
    split: Annotated[Literal["uniform", "midpoint"], Needs("kind", "psd")] = "uniform"
    """Where the progressive kind splits a jump: anywhere, or in the middle, as shortcut models do."""
    diagonal: float = Field(default=0.75, ge=0, le=1)
    """Share of the batch on which the velocity itself is learnt, t = r; 0.75 in the paper's experiments."""
    noise_end: float = Field(default=0.1, ge=0, lt=1)
    """Share of the times that is the noise end itself, where every sampler starts; 0, uniform times, in the paper."""


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch: samples at t, and where their jumps end."""

    x: Tensor
    t: Tensor
    r: Tensor
    condition: Condition


class FlowMap(Method):
    """Learn the ODE's whole flow map X_{t→r}, so that one student makes samples in any number of steps.

    L = E‖u(x_t, t, t) − v‖² + E‖R‖² for X_{t→r}(x) = x + (r − t)·u(x, t, r), where R is ∂_r X − sg v(X, r),
    ∂_t X + sg(∇X·v), or X_{t→r} − sg X_{q→r}(X_{t→q}) over r − t (Boffi et al. 2025).
    """

    Config: ClassVar[type[MethodConfig]] = FlowMapConfig
    family = "flow_map"
    paper = (
        "Boffi et al. 2025, How to build a consistency model: learning flow maps via self-distillation, "
        "arXiv 2505.18825"
    )
    needs_teacher = False
    claims = Claims(steps=(1, 2, 4), one_student=True, exact_map=True)

    def __init__(self, config: FlowMapConfig, setup: Setup) -> None:
        if config.teacher and setup.guided is None:
            raise UserError(
                "teacher.path: missing; distillation needs a teacher, method.teacher=false learns from data"
            )
        self.config, self.student = config, two_time(setup.student)
        self.map = TwoTime.of(self.student)
        self.guided = setup.guided if config.teacher else None
        times = WithAtom(Uniform(Flow()), config.noise_end, noise_end(self.student.process))
        self.law = SpanLaw(times, config.diagonal)
        self.players, self.averages = {"student": Player(self.student.parameters())}, {}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The squared residuals of both parts of the batch, each its sum over the rows of the whole."""
        size = len(batch.x)
        pair, share = self.law.pairs(rng.uniform(size), rng.uniform(size)), self._share(rng, size)
        noise = rng.normal(batch.x)
        x_t, slope, parts = Flow().add_noise(batch.x, noise, pair.t), noise - batch.x, self.law.parts(size, rng.device)
        losses: dict[str, Tensor] = {}
        for name, rows in (("velocity", parts.diagonal), ("jump", parts.jumps)):
            if len(rows):
                at = _Rows(x_t[rows], pair.t[rows], pair.s[rows], batch.condition.rows(rows))
                residual = (
                    self._of_jumps(at, share[rows], rng) if name == "jump" else self._of_velocity(at, slope[rows], rng)
                )
                losses[name] = mean_square(residual).sum() / size
        return Terms(losses)

    def _of_velocity(self, at: _Rows, slope: Tensor, rng: Rng) -> Tensor:
        """u(x, t, t) − v, with the teacher's velocity, or that of the noised sample's own straight line."""
        if self.guided is not None:
            slope = self._velocity(at.x, at.t, at.condition, rng)
        return self.map.velocity(at.x, at.t, at.t, at.condition) - slope

    def _of_jumps(self, at: _Rows, share: Tensor, rng: Rng) -> Tensor:
        def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.map.velocity(x, t, r, at.condition)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(x, t, at.condition, rng)

        match self.config.kind:
            case "lsd":
                return lagrangian(average, velocity, at.x, at.t, at.r)
            case "esd":
                return eulerian(average, velocity, at.x, at.t, at.r)
            case "psd":
                return progressive(average, at.x, at.t, at.r, share)

    @torch.no_grad()
    def _velocity(self, x: Tensor, t: Tensor, condition: Condition, rng: Rng) -> Tensor:
        """The teacher's, or the student's own on the diagonal."""
        if self.guided is not None:
            return viewed(self.guided.drawn(rng, len(x)), Flow())(x, t, condition).velocity
        return self.map.velocity(x, t, t, condition)

    def _share(self, rng: Rng, batch: int) -> Tensor:
        """How far along each jump its two halves meet."""
        drawn = rng.uniform(batch)
        return torch.full_like(drawn, 0.5) if self.config.split == "midpoint" else drawn

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """A jump from each time to the next, the last one to clean data."""
        return Sampler(process.step_list(steps), "flow_map")
