"""SiD: score identity distillation, and SiD-LSG by its guided fake score."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform, annealed
from fewstep.errors import UserError
from fewstep.losses.denoising import denoising
from fewstep.losses.score import Weight, sid
from fewstep.models.guidance import Guided
from fewstep.models.players import Player
from fewstep.models.rollout import backward_simulation
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Window
from fewstep.training.method import Critics, Method, Setup, Terms, Turn


class SiDConfig(MethodConfig):
    """Settings of SiD."""

    alpha: float = Field(default=1.0, ge=0, le=1.5)
    """The share a of ‖y_r − y_f‖² that is taken off. SiD's is 1.2, but 1.0 on AFHQ and in SiD-LSG: above 1 a student
    whose noisy variance is more than a/(a − 1) times its teacher's is pushed to be broader yet."""
    fake_score_updates: int = Field(default=1, ge=1)
    """Updates of the fake score before each of the student; the paper's is 1."""
    renoise: Window = (0.02, 0.98)
    """Window of noise levels at which student samples are judged, as shares of the process's range. SiD-LSG's is
    (0.02, 0.98) of the indices; SiD's own is (0, 0.8) of EDM's."""
    times: tuple[float, ...] | None = None
    """Start times of the student's steps; None is the process's own list. The papers' one-step students start at
    σ = 2.5 (EDM) and index 625 (SD 1.5)."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the window's clean edge falls to its place, so that the student finds every mode
    before any has walls around it (as in `dmd2`); 0 is the paper's."""
    weight: Weight = "dmd"
    """Weight of each sample: `dmd` divides by mean|x̂ − y_r| (the paper's); `none`."""
    fake_guidance: float = Field(default=1.0, ge=0)
    """Guidance under which the fake score is trained and judged (SiD-LSG's κ1 = κ2 = κ3, 2 there and equal to
    teacher.guidance, κ4); 1 is SiD."""
    fake_score_lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA fake score on the teacher's frozen weights; None trains a copy of the student's first weights."""


class SiD(Method):
    """Match the student's scores to the teacher's by a loss that needs no data and differentiates through both.

    L = E[Σ (y_r − y_f)·((y_r − x̂) − a·(y_r − y_f))/ω] with y_r, y_f the clean-sample estimates of teacher and fake
    score at x_t = α_t·x̂ + σ_t·ε, and gradient to x̂ through both (Zhou et al. 2024, algorithm 1's generator loss).
    """

    Config: ClassVar[type[MethodConfig]] = SiDConfig
    family = "distribution"
    paper = "Zhou et al. 2024, Score identity Distillation, arXiv 2404.04057; SiD-LSG, arXiv 2406.01561"

    def __init__(self, config: SiDConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.student, self.real_score = config, setup.student, setup.guided
        if config.fake_guidance != 1 and setup.guided.null is None:
            raise UserError(f"method.fake_guidance: {config.fake_guidance} needs a conditional teacher; allowed is 1")
        self.fake_score = setup.fake_score(config.fake_score_lora)
        self.guided_fake = Guided(self.fake_score, setup.guided.null, config.fake_guidance)
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
        """The identity's loss. No weight of either score moves at this turn, but gradients pass through both."""
        made = backward_simulation(self.student, self.times, batch.x, batch.condition, rng)
        x_hat = made.x
        t = judged_at(rng.uniform(len(x_hat)))
        x_t = self.student.process.add_noise(x_hat, rng.normal(x_hat), t)
        real = self.real_score.drawn(rng, len(x_hat))(x_t, t, batch.condition).x0
        fake = self.guided_fake(x_t, t, made.told(batch.condition, self.fake_score)).x0
        loss = sid(x_hat, fake, real, self.config.alpha, self.config.weight)
        return Terms({"score_identity": loss}, {"score_gap": (fake - real).abs().mean()})

    def fake_score_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Denoising on the student's samples, of the output that the student's loss reads."""
        with torch.no_grad():
            made = backward_simulation(self.student, self.times, batch.x, batch.condition, rng)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t, noise = self.all_times(rng.uniform(len(x_hat))), rng.normal(x_hat)
        fake = self.guided_fake(self.student.process.add_noise(x_hat, noise, t), t, condition)
        return Terms({"denoising": denoising(fake, x_hat, noise, self.fake_score.kind)})

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler.renoising(process, steps, config.times if isinstance(config, SiDConfig) else None)
