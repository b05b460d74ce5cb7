"""Continuous-time consistency: sCD from a teacher, sCT from data."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.derivative import STEP, Derivative, Tangent, along
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Process, TrigFlow, expand
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import LogNormal
from fewstep.diffusion.view import viewed
from fewstep.errors import UserError
from fewstep.losses.denoising import regression_target
from fewstep.losses.tangent import LevelWeight, bounded, consistency_tangent, weighted_by_level
from fewstep.models.conditioning import Condition
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class ContinuousConsistencyConfig(MethodConfig):
    """Settings of continuous-time consistency."""

    teacher: bool = True
    """Whether dx/dt is the guided teacher's velocity (sCD), or that of the sample's own noise (sCT)."""
    sigma_data: float = Field(default=0.5, gt=0)
    """σ_d of TrigFlow, the standard deviation of the data (0.5 for EDM's images)."""
    time_mean: float = 0.5
    """Mean of ln(σ_d·tan t), the log noise-to-signal ratio; −1 in the paper on CIFAR-10, −0.8 on ImageNet-512. Ours is
    higher and wider, because samplers here start at the noise end itself, the paper's at a ratio of 80."""
    time_std: float = Field(default=2.5, gt=0)
    """Its standard deviation; 1.4 in the paper on CIFAR-10, 1.6 on ImageNet."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the run over which the tangent's second half is faded in; the paper's 10,000 steps of 400,000 are
    0.025."""
    c: float = Field(default=0.01, gt=0)
    """Tangents of a root mean square above it count alike; the paper's 0.1 of a whole norm is 0.0018 on CIFAR-10."""
    weight: Literal["learned", "none"] = "learned"
    """Weight of a noise level: `learned` levels out the errors, by a player of its own, `weight`."""
    derivative: Derivative = "jvp"
    """How the network is differentiated along the ODE; `central_difference` where a kernel has no forward derivative,
    and for a teacher trained at whole indices only, which is rough in between."""
    step: Annotated[float, Needs("derivative", "central_difference")] = Field(default=STEP, gt=0)
    """Of that difference, in the log noise-to-signal ratio; 0.1 is some ten of 1,000 indices."""


class ContinuousConsistency(Method):
    """Keep the map to the clean end constant along the teacher's ODE, in the limit of vanishing steps.

    L = e^w(t)·|F_θ − sg(F_θ + g/(|g| + c))|² − w(t) with g = cos t·df_θ/dt of f_θ = cos t·x − sin t·σ_d·F_θ on TrigFlow
    (Lu & Song 2025, eq. 8 and algorithm 1), where dF_θ/dt is a forward derivative.
    """

    Config: ClassVar[type[MethodConfig]] = ContinuousConsistencyConfig
    family = "consistency"
    paper = "Lu & Song 2025, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv 2410.11081"
    needs_teacher = False
    claims = Claims(one_student=True)

    def __init__(self, config: ContinuousConsistencyConfig, setup: Setup) -> None:
        if config.teacher and setup.guided is None:
            raise UserError(
                "teacher.path: missing; distillation needs a teacher, method.teacher=false trains from data"
            )
        self.config, self.student, self.run_steps = config, setup.student, setup.run_steps
        self.trig = TrigFlow(config.sigma_data)
        self.seen = viewed(setup.student, self.trig)
        self.guided = setup.guided if config.teacher else None
        self.times = LogNormal(self.trig, config.time_mean, config.time_std)
        self.players, self.averages = {"student": Player(setup.student.parameters())}, {}
        self.log_weight = None
        if config.weight == "learned":
            self.log_weight = LevelWeight().to(setup.example.x.device)
            self.players["weight"] = Player.of(self.log_weight)

    def turn(self, step: int) -> Turn:
        """One loss for the student and the weight of noise levels; the tangent's warm-up is in the step."""
        over = self.config.warmup * self.run_steps
        ramp = min(1.0, step / over) if over else 1.0
        return Turn("student", tuple(self.players), partial(self.loss, ramp=ramp))

    def loss(self, batch: Batch, rng: Rng, ramp: float) -> Terms:
        """The squared distance of F to sg(F + g), whose gradient with respect to F is −2·g, in each level's weight."""
        t, noise = self.times(rng.uniform(len(batch.x))), rng.normal(batch.x)
        x_t = self.trig.add_noise(batch.x, noise, t)
        slope = self._slope(x_t, t, batch, noise, rng)
        here = self._along_the_ode(x_t, t, slope, batch.condition)
        tangent = consistency_tangent(x_t, t, here.value, slope, here.slope, ramp)
        target = here.value / self.trig.sigma_data + bounded(tangent, self.config.c)
        output = self.seen(x_t, t, batch.condition).velocity / self.trig.sigma_data
        log_weight = torch.zeros_like(t) if self.log_weight is None else self.log_weight(t)
        loss = weighted_by_level(output, target, log_weight).mean()
        return Terms({"consistency": loss}, {"tangent": tangent.square().mean().sqrt()})

    @torch.no_grad()
    def _slope(self, x_t: Tensor, t: Tensor, batch: Batch, noise: Tensor, rng: Rng) -> Tensor:
        """The ODE's dx/dt by the teacher, or its estimate from the sample and the noise that made x_t."""
        if self.guided is not None:
            return viewed(self.guided.drawn(rng, len(x_t)), self.trig)(x_t, t, batch.condition).velocity
        return regression_target(self.trig, t, batch.x, noise, Kind.VELOCITY)

    def _along_the_ode(self, x_t: Tensor, t: Tensor, slope: Tensor, condition: Condition) -> Tangent:
        """σ_d·F and cos t·sin t times its derivative along (dx/dt, 1): in steps of the log noise-to-signal ratio."""
        unit = torch.cos(t) * torch.sin(t)
        return along(
            lambda x, t: self.seen(x, t, condition).velocity,
            (x_t, t),
            (expand(unit, x_t).to(x_t) * slope, unit),
            self.config.derivative,
            self.config.step,
        )

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0 = f(x_t, t), re-noised at each following time."""
        return Sampler(process.step_list(steps), "renoise")
