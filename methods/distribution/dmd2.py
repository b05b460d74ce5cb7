"""DMD2: improved distribution matching distillation, and DMD by its options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.pairs import Pairs
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform, annealed
from fewstep.losses.adversarial import Adversarial, generator_loss
from fewstep.losses.consistency import pseudo_huber_elements
from fewstep.losses.denoising import denoising
from fewstep.losses.score import Weight, distribution_matching
from fewstep.models.discriminator import Discriminator
from fewstep.models.players import Player
from fewstep.models.rollout import Rolled, backward_simulation, from_noised_data, one_step
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs, Window
from fewstep.training.method import Critics, Method, Setup, Terms, Turn


class DMD2Config(MethodConfig):
    """Settings of DMD2; the defaults are the paper's without its GAN, which `gan_weight` turns on."""

    critic_updates: int = Field(default=5, ge=1)
    """Updates of the fake score for each of the student (two time-scale rule, section 4.2); 10 for SD1.5."""
    renoise: Window = (0.02, 0.98)
    """Window of noise levels at which student samples are judged, as shares of the process's range."""
    times: tuple[float, ...] | None = None
    """Start times of the student's steps; None is the process's own list. SDXL's one-step student starts at 399."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the window's clean edge falls to its place, so that the student finds every mode
    before any has walls around it (as DMDR's annealed re-noising, arXiv 2511.13649); 0 is the paper's."""
    weight: Weight = "dmd"
    """Per-sample weight of the direction: `dmd` divides by mean|x̂ − x̂_0,real| (DMD, eq. 8); `none`."""
    rollout: Literal["backward_simulation", "noised_data"] = "backward_simulation"
    """What later steps of a multi-step student are fed in training (section 4.5)."""
    fake_score_lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA fake score on the teacher's frozen weights; None trains a copy of the student's first weights."""
    gan_weight: float = Field(default=0.0, ge=0)
    """Weight of the student's adversarial loss (section 4.3); the paper's is 3e-3 on ImageNet, 5e-3 on SDXL."""
    discriminator_weight: Annotated[float, Needs("gan_weight")] = Field(default=1e-2, ge=0)
    """Weight of the discriminator's loss beside the fake score's."""
    gan_features: Annotated[Literal["fake_score", "teacher"], Needs("gan_weight")] = "fake_score"
    """Whose bottleneck the discriminator reads; the paper's is the fake score, which its loss then trains too."""
    gan_loss: Annotated[Adversarial, Needs("gan_weight")] = Adversarial.NON_SATURATING
    """Pair of adversarial losses."""
    r1_weight: Annotated[float, Needs("gan_weight")] = Field(default=0.0, ge=0)
    """Weight γ of the discriminator's approximate R1 penalty."""
    regression_weight: Annotated[float, Needs("pairs")] = Field(default=0.0, ge=0)
    """Weight of DMD's regression onto stored teacher pairs (DMD, eq. 9; 0.25 there); 0 is DMD2."""
    pairs: Annotated[Path | None, Needs("regression_weight")] = None
    """The teacher's stored pairs, made by `fewstep pairs`; needed by the regression."""


class DMD2(Method):
    """Match the student's distribution to the teacher's by the difference of two scores.

    The student descends E[ω·(x̂_0,fake − x̂_0,real)·∂x̂/∂θ] at re-noised samples x_t = α_t·x̂ + σ_t·ε, where the fake
    score is trained all along on the student's samples.
    """

    Config: ClassVar[type[MethodConfig]] = DMD2Config
    family = "distribution"
    paper = "Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867"

    def __init__(self, config: DMD2Config, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.student, self.real_score = config, setup.student, setup.guided
        self.fake_score = setup.fake_score(config.fake_score_lora)
        student, fake_score = Player(self.student.parameters()), Player(self.fake_score.parameters())
        self.players, self.averages = {"student": student, "fake_score": fake_score}, {}
        self.discriminator = self._discriminator(setup) if config.gan_weight else None
        if self.discriminator is not None:
            self.players["discriminator"] = Player.of(self.discriminator.heads)
        self.critics = Critics(self.fake_score, self.discriminator)
        self.times = self.sampler(config, self.student.process, setup.steps).times
        self.all_times, self.run_steps = Uniform(self.student.process), setup.run_steps
        self.pairs = Pairs.open(config.pairs, config.regression_weight, setup.example)

    def _discriminator(self, setup: Setup) -> Discriminator:
        of_fake = self.config.gan_features == "fake_score"
        return Discriminator.on(self.fake_score if of_fake else setup.frozen_teacher(), setup.example)

    def turn(self, step: int) -> Turn:
        """`critic_updates` turns of the critic, then one of the student."""
        if step % (self.config.critic_updates + 1) == self.config.critic_updates:
            window = annealed(self.config.renoise, self.config.anneal, step / self.run_steps)
            law = Uniform(self.student.process, *window)
            return Turn("student", ("student",), partial(self.student_loss, judged_at=law))
        critic = tuple(name for name in self.players if name != "student")
        return Turn("critic", critic, self.critic_loss)

    def student_loss(self, batch: Batch, rng: Rng, judged_at: Uniform) -> Terms:
        """Distribution matching (DMD, eq. 7), with the adversarial and the regression term where asked for."""
        made = self._rollout(batch, rng)
        x_hat, t = made.x, judged_at(rng.uniform(len(made.x)))
        x_t = self.student.process.add_noise(x_hat.detach(), rng.normal(x_hat), t)
        with torch.no_grad():
            real = self.real_score.drawn(rng, len(x_t))(x_t, t, batch.condition)
            fake = self.fake_score(x_t, t, made.told(batch.condition, self.fake_score))
        losses = {"distribution_matching": distribution_matching(x_hat, fake, real, self.config.weight)}
        if self.discriminator is not None:
            logits = self.discriminator.of_clean(x_hat, batch.condition, rng)
            losses["adversarial"] = self.config.gan_weight * generator_loss(self.config.gan_loss, logits)
        if self.pairs is not None:
            losses["regression"] = self.config.regression_weight * self._regression(self.pairs, len(x_hat), rng)
        return Terms(losses, {"score_gap": (fake.x0 - real.x0).abs().mean()})

    def critic_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Denoising on the student's samples, and the discriminator's loss where there is one."""
        with torch.no_grad():
            made = self._rollout(batch, rng)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t, noise = self.all_times(rng.uniform(len(x_hat))), rng.normal(x_hat)
        fake = self.fake_score(self.student.process.add_noise(x_hat, noise, t), t, condition)
        losses = {"denoising": denoising(fake, x_hat, noise, self.fake_score.kind)}
        if self.discriminator is not None:
            pay = self.discriminator.losses(self.config.gan_loss, batch, x_hat, rng, self.config.r1_weight)
            losses |= {name: self.config.discriminator_weight * loss for name, loss in pay.items()}
        return Terms(losses)

    def _rollout(self, batch: Batch, rng: Rng) -> Rolled:
        if self.config.rollout == "noised_data":
            return from_noised_data(self.student, self.times, batch.x, batch.condition, rng)
        return backward_simulation(self.student, self.times, batch.x, batch.condition, rng)

    def _regression(self, pairs: Pairs, batch: int, rng: Rng) -> Tensor:
        """The student's sample from a stored noise against the teacher's from the same (DMD, eq. 9)."""
        pair = pairs.draw(rng, batch)
        x_hat = one_step(self.student, self.times[0], pair.noise, pair.condition)
        return pseudo_huber_elements(x_hat, pair.x0).mean()

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler.renoising(process, steps, config.times if isinstance(config, DMD2Config) else None)
