"""SCFM: a flow model teaches itself to take steps as long as two, without being told how long a step is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Flow, Process, expand
from fewstep.diffusion.solvers import Denoiser, Sampler
from fewstep.diffusion.times import below
from fewstep.diffusion.view import viewed
from fewstep.errors import UserError
from fewstep.losses.consistency import l2
from fewstep.losses.trajectory import mean_velocity
from fewstep.models.conditioning import Condition
from fewstep.models.players import Average, Player
from fewstep.models.shards import rows_to_ask
from fewstep.models.transfer import sent
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.training.method import Claims, Method, Setup, Terms, Turn

PARTS = 1_000_000


class SCFMConfig(MethodConfig):
    """Settings of SCFM."""

    intervals: int = Field(default=64, ge=2)
    """Finest steps between noise and data. The teacher takes two of these; the student learns two that are 1, 2, 4, ...
    times as long, up to 1/`student.steps`, the length that it is sampled with."""
    teacher_share: float = Field(default=0.4, ge=0, le=1)
    """Share of the batch that learns two of the teacher's finest steps, and not two of the target's own: the only
    thing that keeps the student to the data."""
    target_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the fast average that is the target; the slow one, which is sampled, is `train.ema` (0.999)."""


@dataclass(frozen=True)
class Steps:
    """Two steps in a row.

    Attributes:
        t: `(B,)` flow time where the first begins.
        gap: `(B,)` how long each of them is.
    """

    t: Tensor
    gap: Tensor

    def rows(self, index: Tensor) -> Steps:
        """Those of the samples at `index`."""
        return Steps(self.t[index], self.gap[index])


class SCFM(Method):
    """Straighten a pretrained flow by self-distillation: one step as long as two, at every length, without being told.

    L = E‖v_θ(x_t, t) − sg[(d₁·v(x_t, t) + d₂·v(x_{t−d₁}, t−d₁))/(d₁+d₂)]‖² with x_{t−d₁} = x_t − d₁·v(x_t, t), where v
    is a fast average of the student, or the teacher on the finest steps (Cai et al. 2025, its velocity
    self-distillation). A velocity that fits steps of every length is constant along its path: the student is a
    straightened flow, not the teacher's flow map, and sampled like any flow model. In one step it blurs: it is made for
    two and more.
    """

    Config: ClassVar[type[MethodConfig]] = SCFMConfig
    family = "trajectory"
    paper = "Cai et al. 2025, Shortcutting Pre-trained Flow Matching Diffusion Models, arXiv 2510.17858"
    claims = Claims(steps=(2, 4))

    def __init__(self, config: SCFMConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.levels = config, _levels(config.intervals, setup.steps)
        self.student, player = setup.student, Player(setup.student.parameters())
        self.target = self.student.follower("target")
        average = Average(player, config.target_decay, self.target.shadow_of(player), False)
        self.players, self.averages = {"student": player}, {"target": average}
        self.flow, self.target_flow = viewed(self.student, Flow()), viewed(self.target, Flow())
        self.guided = setup.guided

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The error of the velocity against the mean of two steps', the teacher's or the target's."""
        taught = rng.rows(PARTS, len(batch.x)) < self.config.teacher_share * PARTS  # on the host: nothing waits
        steps = self._steps(rng.uniform(len(batch.x)), rng.uniform(len(batch.x)), sent(taught, batch.x.device))
        x_t = Flow().add_noise(batch.x, rng.normal(batch.x), steps.t)
        target, teacher = torch.empty_like(x_t), self.guided.drawn(rng, len(x_t))
        with torch.no_grad():
            for mask in (taught, ~taught):
                own = mask.nonzero()[:, 0]
                rows = sent(rows_to_ask(own, self.student.network), batch.x.device)
                if len(rows):
                    denoiser = viewed(teacher.rows(rows), Flow()) if mask is taught else self.target_flow
                    told = batch.condition.rows(rows)
                    said = two_steps(denoiser, x_t[rows], steps.rows(rows), told).to(target)
                    target[rows[: len(own)]] = said[: len(own)]
        velocity = self.flow(x_t, steps.t, batch.condition).velocity
        return Terms({"self_distillation": l2(velocity, target).mean()})

    def _steps(self, u: Tensor, v: Tensor, taught: Tensor) -> Steps:
        """Steps of a random length, the finest where `taught`, from any point of the grid that leaves them room."""
        finest = 1 / self.config.intervals
        length = torch.where(taught, 1.0, torch.exp2(below(self.levels, u)))
        start = 2 * length + ((self.config.intervals - 2 * length + 1) * v).floor()
        return Steps(start.clamp_max(self.config.intervals) * finest, length * finest)

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """Euler's steps on the straightened path; a DDIM step is one, in every process."""
        return Sampler(process.step_list(steps), "ddim")


def two_steps(denoiser: Denoiser, x: Tensor, steps: Steps, condition: Condition) -> Tensor:
    """The mean velocity `(B, *)` of two steps of the denoiser on flow matching, from x `(B, *)`."""
    first = denoiser(x, steps.t, condition).velocity
    middle = x - expand(steps.gap, x).to(x) * first
    second = denoiser(middle, steps.t - steps.gap, condition).velocity
    return mean_velocity(first, second, steps.gap, steps.gap)


def _levels(intervals: int, steps: int) -> int:
    """How many lengths there are, 1, 2, 4, ... of `intervals`: up to 1/`steps`, and to a half, for there are two."""
    longest = intervals // max(steps, 2)
    if not longest:
        raise UserError(f"method.intervals: {intervals} given, student.steps={steps} needs at least as many")
    return longest.bit_length()
