"""Consistency distillation and training on a discrete grid, with LCM's choices by its options."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser, Sampler, teacher_step
from fewstep.diffusion.times import GridPairs, TimePair
from fewstep.errors import UserError
from fewstep.losses.consistency import Boundary, EDMBoundary, LCMBoundary, PlainBoundary, l2, pseudo_huber_elements
from fewstep.models.conditioning import Condition
from fewstep.models.guidance_input import with_guidance, with_guidance_input
from fewstep.models.players import Average, Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs, Range
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class ConsistencyConfig(MethodConfig):
    """Settings of consistency distillation."""

    teacher: bool = True
    """Whether the next point comes from a teacher's step (distillation), or from the same noise (training)."""
    solver: Annotated[Literal["euler", "heun", "ddim"], Needs("teacher")] = "heun"
    """The teacher's step from t to s; consistency models use Heun, LCM uses DDIM."""
    intervals: int = Field(default=50, ge=2)
    """Intervals of the time grid: LCM's 50 of the trailing grid, or 18 to 40 as in consistency models."""
    skip: int = Field(default=1, ge=1)
    """Grid points between t and s: LCM's skipping interval is 20 of 1,000 indices, 1 of 50 intervals."""
    boundary: Literal["plain", "lcm", "edm"] = "plain"
    """How f(x, t) = c_skip·x + c_out·x̂_0 keeps the clean end fixed; plain is f = x̂_0, exact where σ ends at 0."""
    target: Literal["ema", "self"] = "ema"
    """Whose output at s is the target: an average of the student, or the student itself."""
    target_decay: Annotated[float, Needs("target", "ema")] = Field(default=0.95, ge=0, lt=1)
    """Decay of that average."""
    metric: Literal["pseudo_huber", "l2"] = "pseudo_huber"
    """Distance of the two outputs."""
    huber_c: Annotated[float, Needs("metric", "pseudo_huber")] = Field(default=1e-3, gt=0)
    """Where pseudo-Huber turns from quadratic to linear, per element (LCM: 1e-3)."""
    guidance_range: Annotated[Range | None, Needs("teacher")] = None
    """Range of guidance scales drawn per sample and given to the network as an input (LCM); None: teacher.guidance."""


class Consistency(Method):
    """Map every point of a trajectory to its clean end, by agreeing with the next cleaner point.

    L = d(f_θ(x_t, t), sg f_θ⁻(x̂_s, s)) for neighbours t > s of a grid, where x̂_s is one step of the teacher's ODE from
    x_t (Song et al. 2023, eq. 7), or has the noise of x_t (consistency training, eq. 10).
    """

    Config: ClassVar[type[MethodConfig]] = ConsistencyConfig
    family = "consistency"
    paper = "Song et al. 2023, Consistency Models, arXiv 2303.01469; Luo et al. 2023 (LCM), arXiv 2310.04378"
    needs_teacher = False
    claims = Claims(one_student=True)

    def __init__(self, config: ConsistencyConfig, setup: Setup) -> None:
        if config.teacher and setup.guided is None:
            raise UserError(
                "teacher.path: missing; distillation needs a teacher, method.teacher=false trains from data"
            )
        if config.guidance_range is not None and (setup.guided is None or setup.guided.null is None):
            raise UserError("method.guidance_range: guidance comes from a conditional teacher, and this run has none")
        self.config, self.guided = config, setup.guided
        scales = config.guidance_range
        self.student = with_guidance_input(setup.student, scales) if scales is not None else setup.student
        self.pairs = GridPairs(self.student.process, config.intervals, config.skip)
        self.boundary = _boundary(config.boundary)
        player = Player(self.student.parameters())
        self.players, self.averages, self.target = {"student": player}, {}, self.student
        if config.target == "ema":
            self.target = self.student.follower("target")
            self.averages = {"target": Average(player, config.target_decay, self.target.shadow_of(player), False)}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The distance of neighbours' outputs; the target side carries no gradient."""
        pair, noise = self.pairs(rng.uniform(len(batch.x))), rng.normal(batch.x)
        x_t = self.student.process.add_noise(batch.x, noise, pair.t)
        scale = self._scale(rng, len(batch.x))
        condition = batch.condition if scale is None else with_guidance(batch.condition, scale, self.student)
        with torch.no_grad():
            x_s = self._cleaner(x_t, batch, noise, pair, scale, rng)
            target = self._f(self.target, x_s, pair.s, condition)
        output = self._f(self.student, x_t, pair.t, condition)
        return Terms({"consistency": self._distance(output, target).mean()})

    def _cleaner(
        self, x_t: Tensor, batch: Batch, noise: Tensor, pair: TimePair, scale: Tensor | None, rng: Rng
    ) -> Tensor:
        """The state at s on the trajectory through x_t."""
        if not self.config.teacher:
            return self.student.process.add_noise(batch.x, noise, pair.s)
        assert self.guided is not None
        guided = self.guided.drawn(rng, len(x_t)) if scale is None else self.guided.at(scale)
        return teacher_step(guided, x_t, pair.t, pair.s, batch.condition, self.config.solver)

    def _f(self, denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The consistency function (Song et al. 2023, eq. 5)."""
        return self.boundary.apply(x, denoiser(x, t, condition).x0, t)

    def _scale(self, rng: Rng, batch: int) -> Tensor | None:
        """One guidance scale a sample, uniform in the configured range."""
        if self.config.guidance_range is None:
            return None
        low, high = self.config.guidance_range
        return low + (high - low) * rng.uniform(batch)

    def _distance(self, output: Tensor, target: Tensor) -> Tensor:
        if self.config.metric == "l2":
            return l2(output, target)
        return pseudo_huber_elements(output, target, self.config.huber_c)

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """Multistep consistency sampling (Song et al. 2023, algorithm 1): x̂_0, re-noised at each following time."""
        return Sampler(process.step_list(steps), "renoise")


def _boundary(name: str) -> Boundary:
    match name:
        case "lcm":
            return LCMBoundary()
        case "edm":
            return EDMBoundary()
        case _:
            return PlainBoundary()
