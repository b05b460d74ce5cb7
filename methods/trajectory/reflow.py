"""Reflow: the straight flow between a teacher's noise and its samples, and InstaFlow's one-step distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.pairs import Pairs
from fewstep.diffusion.process import Flow, Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.view import viewed
from fewstep.losses.consistency import l2
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class ReflowConfig(MethodConfig):
    """Settings of reflow."""

    pairs: Path | None = None
    """The guided teacher's stored pairs of noise and sample, made by `fewstep pairs`; needed. The papers use 1 M and
    more; a student can be no better than they are."""
    times: Literal["uniform", "u_shaped"] = "uniform"
    """Law of the flow time t: uniform (rectified flow), or dense at both ends, where the error of a reflow is largest
    (Lee et al. 2024, arXiv 2405.20320, section 4)."""
    bend: Annotated[float, Needs("times", "u_shaped")] = Field(default=4.0, gt=0, le=20)
    """The a of the u-shaped density e^(at) + e^(a(1−t)); 4 in Lee et al."""
    one_step_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the batch at t = 1, the only time that a one-step student is evaluated at. InstaFlow reflows with 0 and
    then distils with 1, a second run whose `student.path` is the first one's export."""


@dataclass(frozen=True)
class PairTimes:
    """Flow times above `low`, at most 1, some of them 1.

    Attributes:
        low: the cleanest time.
        one_step_share: probability of t = 1.
        bend: a of the density e^(at) + e^(a(1−t)) of the others, 0 for the uniform law.
    """

    low: float
    one_step_share: float = 0.0
    bend: float = 0.0

    def __call__(self, u: Tensor) -> Tensor:
        """Times `(B,)` whose quantiles are 1 − `u`, for uniforms `u` `(B,)` in [0, 1)."""
        centred = 2 * ((1 - u) / (1 - self.one_step_share)).clamp_max(1.0) - 1  # a share of 1 divides by 0: all are 1
        if self.bend:
            centred = torch.asinh(centred * math.sinh(self.bend / 2)) / (self.bend / 2)
        return self.low + (1 - self.low) * (1 + centred) / 2


class Reflow(Method):
    """Straighten the teacher's flow: learn the constant velocity between its noises and the samples it made of them.

    L = E‖v_θ(t·ε + (1−t)·x_0, t) − (ε − x_0)‖² over stored pairs (ε, x_0) of the teacher, t a flow time (Liu et al.
    2023, eq. 1, on the coupling that a first flow made). At t = 1 alone it is InstaFlow's distillation with squared
    error. A network of another process learns it at equal signal-to-noise ratio.
    """

    Config: ClassVar[type[MethodConfig]] = ReflowConfig
    family = "trajectory"
    paper = "Liu et al. 2023, Flow Straight and Fast: Rectified Flow, arXiv 2209.03003; InstaFlow, arXiv 2309.06380"
    claims = Claims(one_student=True, exact_map=True, pairs=True, follows_ode=True)

    def __init__(self, config: ReflowConfig, setup: Setup) -> None:
        self.pairs = Pairs.required(config.pairs, setup.example, f"method.name={config.name}")
        self.student, self.players, self.averages = setup.student, {"student": Player(setup.student.parameters())}, {}
        self.flow, process = viewed(self.student, Flow()), self.student.process
        cleanest = Flow().time_at(process.ratio(torch.tensor(process.t_min, dtype=torch.float64)))
        self.times = PairTimes(float(cleanest), config.one_step_share, config.bend * (config.times == "u_shaped"))

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The error of the velocity between pairs; of the data only the batch's size is used."""
        pair, t = self.pairs.draw(rng, len(batch.x)), self.times(rng.uniform(len(batch.x)))
        velocity = self.flow(Flow().add_noise(pair.x0, pair.noise, t), t, pair.condition).velocity
        return Terms({"reflow": l2(velocity, pair.noise - pair.x0).mean()})

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """Euler's steps along the straight path; a DDIM step is one, in every process."""
        return Sampler(process.step_list(steps), "ddim")
