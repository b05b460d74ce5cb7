"""SwiftBrush: variational score distillation without images, and SNOOPI's PG-SB by its range of guidance."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform, annealed
from fewstep.losses.denoising import denoising
from fewstep.losses.score import distribution_matching, vsd_weight
from fewstep.models.conditioning import Condition
from fewstep.models.players import Player
from fewstep.models.rollout import Rolled, backward_simulation
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs, Range, Window
from fewstep.training.method import Critics, Method, Setup, Terms, Turn


class SwiftBrushConfig(MethodConfig):
    """Settings of SwiftBrush."""

    fake_score_lora: int | None = Field(default=64, ge=1)
    """Rank of the LoRA on the teacher's frozen weights that is the fake score (the paper's 64); None trains a copy of
    the student's first weights, the only choice where the teacher is a closed form."""
    fake_score_updates: int = Field(default=1, ge=1)
    """Updates of the fake score before each of the student; the paper's is 1."""
    renoise: Window = (0.02, 0.98)
    """Window of noise levels at which student samples are judged, as shares of the process's range."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the window's clean edge falls to its place, so that the student finds every mode
    before any has walls around it (as in `dmd2`); 0 is the paper's."""
    guidance_range: Range | None = None
    """Range of guidance scales drawn per sample in place of teacher.guidance: SNOOPI's PG-SB, whose range is (0.5, 4)
    for SD 1.5 and 2.1 and (0.5, 3) for PixArt-α. None: teacher.guidance."""
    guide_fake: bool = True
    """Whether the fake score is guided like the teacher, as in the papers. The student then ends at the teacher
    without guidance, which only weighs its gradient; false ends at the guided teacher, as in `dmd2`."""
    null_share: Annotated[float, Needs("guide_fake")] = Field(default=0.1, ge=0, le=1)
    """Share of samples on which the fake score learns its unconditional output, which guidance needs (code: 0.1)."""


class SwiftBrush(Method):
    """Move the student's samples by the difference of the teacher's noise estimate and a LoRA's that follows them.

    The student descends E[σ_t²·(ε̂_teacher − ε̂_LoRA)·∂x̂/∂θ] at x_t = α_t·x̂ + σ_t·ε (Nguyen & Tran 2024, algorithm
    1, with both estimates guided); no image is ever read, only conditions.
    """

    Config: ClassVar[type[MethodConfig]] = SwiftBrushConfig
    family = "distribution"
    paper = "Nguyen & Tran 2024, SwiftBrush, arXiv 2312.05239; Nguyen et al. 2024 (SNOOPI), arXiv 2412.02687"

    def __init__(self, config: SwiftBrushConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.student, ranged = config, setup.student, config.guidance_range
        self.real_score = setup.guided if ranged is None else setup.guided.ranged(ranged)
        self.fake_score = setup.fake_score(config.fake_score_lora)
        student, fake_score = Player(self.student.parameters()), Player(self.fake_score.parameters())
        self.players, self.averages = {"student": student, "fake_score": fake_score}, {}
        self.critics = Critics(self.fake_score)
        process = self.student.process
        self.times = self.sampler(config, process, setup.steps).times
        self.all_times, self.run_steps = Uniform(process), setup.run_steps

    def turn(self, step: int) -> Turn:
        """`fake_score_updates` turns of the fake score, then one of the student."""
        every = self.config.fake_score_updates + 1
        if step % every != every - 1:
            return Turn("fake_score", ("fake_score",), self.fake_score_loss)
        window = annealed(self.config.renoise, self.config.anneal, step / self.run_steps)
        law = Uniform(self.student.process, *window)
        return Turn("student", ("student",), partial(self.student_loss, judged_at=law))

    def student_loss(self, batch: Batch, rng: Rng, judged_at: Uniform) -> Terms:
        """Variational score distillation; a drawn scale is the same for both scores of a sample."""
        made = self._rollout(batch, rng)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t = judged_at(rng.uniform(len(x_hat)))
        x_t = self.student.process.add_noise(x_hat.detach(), rng.normal(x_hat), t)
        real_score = self.real_score.drawn(rng, len(x_hat))
        fake_score = replace(real_score, denoiser=self.fake_score) if self.config.guide_fake else self.fake_score
        with torch.no_grad():
            real, fake = real_score(x_t, t, batch.condition), fake_score(x_t, t, condition)
        weight = vsd_weight(self.student.process, t)
        loss = distribution_matching(x_hat, fake, real, "none", ratio=weight)
        return Terms({"score_distillation": loss}, {"score_gap": (fake.x0 - real.x0).abs().mean()})

    def fake_score_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Denoising on the student's samples, without guidance."""
        with torch.no_grad():
            made = self._rollout(batch, rng)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t, noise = self.all_times(rng.uniform(len(x_hat))), rng.normal(x_hat)
        x_t = self.student.process.add_noise(x_hat, noise, t)
        fake = self.fake_score(x_t, t, self._some_null(condition, len(x_hat), rng))
        return Terms({"denoising": denoising(fake, x_hat, noise, self.fake_score.kind)})

    def _rollout(self, batch: Batch, rng: Rng) -> Rolled:
        return backward_simulation(self.student, self.times, batch.x, batch.condition, rng)

    def _some_null(self, condition: Condition, batch: int, rng: Rng) -> Condition:
        """The condition with a share of its samples told nothing, where the fake score's guidance asks for that."""
        null = self.real_score.null
        if null is None or self.real_score.scale == 1.0 or not self.config.guide_fake:
            return condition
        return condition.replaced_where(rng.uniform(batch) < self.config.null_share, condition.nulled(null, batch))

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler.of(process, steps, "renoise")
