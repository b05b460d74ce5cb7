"""Progressive distillation: the student's steps halve stage by stage, each stage's student teaching the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process, expand
from fewstep.diffusion.solvers import Denoiser, Sampler, jump
from fewstep.diffusion.times import below
from fewstep.errors import UserError
from fewstep.losses.consistency import l2
from fewstep.losses.trajectory import DistillationWeight, distillation_weight, invert_jump
from fewstep.models.conditioning import Condition
from fewstep.models.players import Average, Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.training.method import Method, Setup, Stage, Terms, Turn

TEACHER = "teacher"


class ProgressiveConfig(MethodConfig):
    """Settings of progressive distillation."""

    start_steps: int = Field(default=64, ge=2)
    """DDIM steps of the first teacher: `student.steps` times 2, 4, 8, ... Each doubling is one stage more, and what the
    last student can reach is that sampler; the paper starts at 8,192 on CIFAR-10."""
    growth: float = Field(default=1.0, gt=0)
    """How many times longer each stage is than the one before it; 1 divides the run's steps equally. The paper's stages
    are equal too, but that the last two take twice as long."""
    weight: DistillationWeight = "truncated_snr"
    """Weight of the error of x̂_0 (section 4): `truncated_snr` is max(SNR, 1), `snr_plus_one` is SNR + 1, the error of
    v. Plain SNR would count nothing at pure noise, where every student starts."""


@dataclass(frozen=True)
class Halving:
    """One stage.

    Attributes:
        steps: of the student, which learns two steps of its teacher in each.
        grid: `(2·steps + 1,)` start times of the teacher's steps, noise end first, and the clean end.
        stage: when.
    """

    steps: int
    grid: Tensor
    stage: Stage


class Progressive(Method):
    """Halve the steps of a sampler, again and again, each time learning two of its steps as one.

    L = E[max(SNR_t, 1)·‖x̂_0,θ(x_t, t) − x̃‖²] at the student's times t, where x̃ is the clean sample whose one DDIM step
    from x_t lands where two steps of the teacher do (Salimans & Ho 2022, algorithm 2). After a stage the student's
    weights become the teacher's, and the optimizer starts anew.
    """

    Config: ClassVar[type[MethodConfig]] = ProgressiveConfig
    family = "trajectory"
    paper = "Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512"

    def __init__(self, config: ProgressiveConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.student, self.guided = config, setup.student, setup.guided
        counts, process = _counts(config.start_steps, setup.steps), self.student.process
        stages = _stages(len(counts), config.growth, setup.run_steps)
        device = setup.example.x.device
        grids = (torch.tensor([*process.step_list(2 * n), process.t_min], device=device) for n in counts)
        self.halvings = [Halving(*one) for one in zip(counts, grids, stages, strict=True)]
        player, self.teacher = Player(self.student.parameters()), self.student.follower(TEACHER)
        self.players = {"student": player}
        self.averages = {TEACHER: Average(player, 0.0, self.teacher.shadow_of(player), False)}

    def turn(self, step: int) -> Turn:
        """The student's, in the stage of that step; the first stage's teacher is the given one under guidance."""
        halving = next((one for one in self.halvings if step < one.stage.end), self.halvings[-1])
        loss = partial(self.loss, halving=halving)
        return Turn(f"{halving.steps}_steps", ("student",), loss, halving.stage, (TEACHER,))

    def loss(self, batch: Batch, rng: Rng, halving: Halving) -> Terms:
        """The weighted error of x̂_0 at one of the times of the stage's sampler, drawn for each sample."""
        process, grid = self.student.process, halving.grid
        teacher = self.guided.drawn(rng, len(batch.x)) if halving is self.halvings[0] else self.teacher
        start = 2 * below(halving.steps, rng.uniform(len(batch.x)))
        t, middle, end, clean = grid[start], grid[start + 1], grid[start + 2], start + 2 == len(grid) - 1
        x_t = process.add_noise(batch.x, rng.normal(batch.x), t)
        with torch.no_grad():
            landing = _two_steps(teacher, x_t, t, middle, end, clean, batch.condition)
            target = invert_jump(process, x_t, t, landing, end, clean)
        error = l2(self.student(x_t, t, batch.condition).x0, target)
        return Terms({"distillation": (distillation_weight(process, t, self.config.weight) * error).mean()})

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """DDIM on the grid that the last stage was trained on."""
        return Sampler(process.step_list(steps), "ddim")


def _two_steps(
    teacher: Denoiser, x: Tensor, t: Tensor, middle: Tensor, end: Tensor, clean: Tensor, condition: Condition
) -> Tensor:
    """Where two DDIM steps of the teacher land, x̂_0 of the second where they end at clean data."""
    second = teacher(jump(teacher(x, t, condition), middle), middle, condition)
    return torch.where(expand(clean, x), second.x0, jump(second, end))


def _counts(first: int, last: int) -> list[int]:
    """The student's steps in each stage: half of `first`, a quarter of it, ..., `last`."""
    counts = [first // 2]
    while counts[-1] > last:
        counts.append(counts[-1] // 2)
    if last * 2 ** len(counts) != first:
        raise UserError(
            f"method.start_steps: {first} does not halve to student.steps={last}; give {last} times 2, 4, 8, ..., "
            f"such as {16 * last}"
        )
    return counts


def _stages(count: int, growth: float, run_steps: int) -> list[Stage]:
    """`count` stages that fill the run, each `growth` times as long as the one before it."""
    lengths = [growth**i for i in range(count)]
    ends = [round(run_steps * total / sum(lengths)) for total in accumulate(lengths, initial=0.0)]
    if any(start == end for start, end in pairwise(ends)):
        raise UserError(
            f"train.steps: {run_steps} leaves one of the {count} stages of method.start_steps without a step; "
            "give more steps, or start from fewer"
        )
    return [Stage(start, end) for start, end in pairwise(ends)]
