"""f-distill: distribution matching by any f-divergence, a density ratio weighting every sample."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform, annealed, below
from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial, generator_loss
from fewstep.losses.denoising import denoising
from fewstep.losses.f_divergence import Divergence, density_ratio, divergence_weight, unit_mean
from fewstep.losses.score import Weight, distribution_matching
from fewstep.models.discriminator import Discriminator
from fewstep.models.players import Player
from fewstep.models.rollout import backward_simulation
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Range, Window
from fewstep.training.method import Critics, Method, Setup, Terms, Turn


class FDistillConfig(MethodConfig):
    """Settings of f-distill."""

    divergence: Divergence = Divergence.JS
    """Which f: the paper's best is `js` on ImageNet-64 and text-to-image; `reverse_kl` is DMD2."""
    ratio_bounds: Range = (0.1, 20.0)
    """Smallest and largest density ratio p/q; FastGen's, NVIDIA's implementation."""
    ratio_bins: int = Field(default=0, ge=0)
    """Bins of noise levels, in each of which ratios are divided by their mean over the batch (which the exact ratio's
    expectation makes 1); 0 leaves them. Worth it where a bin holds many samples."""
    critic_updates: int = Field(default=5, ge=1)
    """Updates of the fake score and the discriminator for each of the student, as in DMD2 (section 4.2)."""
    renoise: Window = (0.02, 0.98)
    """Window of noise levels at which student samples are judged, as shares of the process's range."""
    times: tuple[float, ...] | None = None
    """Start times of the student's steps; None is the process's own list."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the window's clean edge falls to its place; 0 is the paper's fixed window."""
    weight: Weight = "dmd"
    """Weight of the direction beside h(r): `dmd` divides by mean|x̂ − x̂_0,real| of each sample; `none`."""
    fake_score_lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA fake score on the teacher's frozen weights; None trains a copy of the student's first weights."""
    discriminator_weight: float = Field(default=1e-2, gt=0)
    """Weight of the discriminator's loss beside the fake score's, as in DMD2."""
    r1_weight: float = Field(default=0.0, ge=0)
    """Weight γ of the discriminator's approximate R1 penalty; above 0 the ratio is flatter than the true one."""
    gan_weight: float = Field(default=0.0, ge=0)
    """Weight of the student's own adversarial loss; DMD2's is 3e-3 on ImageNet."""


class FDistill(Method):
    """Match distributions by an f-divergence: the difference of two scores, weighted by a density ratio.

    The student descends E[h(r)·ω·(x̂_0,fake − x̂_0,real)·∂x̂/∂θ] at re-noised samples x_t (Xu et al. 2025, theorem 1),
    h(r) = f″(r)·r² and r = exp D(x_t, t): D tells re-noised data from re-noised samples by the fake score's features.
    """

    Config: ClassVar[type[MethodConfig]] = FDistillConfig
    family = "distribution"
    paper = "Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching, arXiv 2502.15681"

    def __init__(self, config: FDistillConfig, setup: Setup) -> None:
        assert setup.guided is not None
        if config.ratio_bounds[0] <= 0:
            raise UserError(f"method.ratio_bounds: {list(config.ratio_bounds)} given, ratios are positive")
        self.config, self.student, self.real_score = config, setup.student, setup.guided
        self.fake_score = setup.fake_score(config.fake_score_lora)
        self.discriminator = Discriminator.on(self.fake_score, setup.example)
        student, fake_score = Player(self.student.parameters()), Player(self.fake_score.parameters())
        heads = Player.of(self.discriminator.heads)
        self.players, self.averages = {"student": student, "fake_score": fake_score, "discriminator": heads}, {}
        self.critics = Critics(self.fake_score, self.discriminator)
        self.times = self.sampler(config, self.student.process, setup.steps).times
        self.all_times, self.run_steps = Uniform(self.student.process), setup.run_steps

    def turn(self, step: int) -> Turn:
        """`critic_updates` turns of fake score and discriminator, then one of the student."""
        if step % (self.config.critic_updates + 1) == self.config.critic_updates:
            window = annealed(self.config.renoise, self.config.anneal, step / self.run_steps)
            law = Uniform(self.student.process, *window)
            return Turn("student", ("student",), partial(self.student_loss, judged_at=law))
        return Turn("critic", ("fake_score", "discriminator"), self.critic_loss)

    def student_loss(self, batch: Batch, rng: Rng, judged_at: Uniform) -> Terms:
        """Weighted distribution matching; the ratio comes from the fake score's one evaluation."""
        made = backward_simulation(self.student, self.times, batch.x, batch.condition, rng)
        x_hat = made.x
        u = rng.uniform(len(x_hat))
        t = judged_at(u)
        x_t = self.student.process.add_noise(x_hat.detach(), rng.normal(x_hat), t)
        tapped = self.discriminator.backbone
        with torch.no_grad():
            real = self.real_score.drawn(rng, len(x_t))(x_t, t, batch.condition)
            fake = tapped(x_t, t, made.told(batch.condition, self.fake_score))
            ratio = density_ratio(self.discriminator.heads(tapped.features()), *self.config.ratio_bounds)
        losses = {"f_divergence": distribution_matching(x_hat, fake, real, self.config.weight, self._h(ratio, u))}
        if self.config.gan_weight:
            logits = self.discriminator.of_clean(x_hat, batch.condition, rng)
            losses["adversarial"] = self.config.gan_weight * generator_loss(Adversarial.NON_SATURATING, logits)
        return Terms(losses, {"score_gap": (fake.x0 - real.x0).abs().mean(), "ratio": ratio.mean()})

    def _h(self, ratio: Tensor, u: Tensor) -> Tensor:
        """The weights h(r) `(B,)`, of mean 1, `u` `(B,)` the quantiles of the noise levels."""
        if self.config.ratio_bins:
            ratio = unit_mean(ratio, below(self.config.ratio_bins, u), self.config.ratio_bins)
        return unit_mean(divergence_weight(self.config.divergence, ratio))

    def critic_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Denoising on the student's samples, and telling them from data, whose loss reaches the fake score too."""
        with torch.no_grad():
            made = backward_simulation(self.student, self.times, batch.x, batch.condition, rng)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t, noise = self.all_times(rng.uniform(len(x_hat))), rng.normal(x_hat)
        fake = self.fake_score(self.student.process.add_noise(x_hat, noise, t), t, condition)
        losses = {"denoising": denoising(fake, x_hat, noise, self.fake_score.kind)}
        pay = self.discriminator.losses(Adversarial.NON_SATURATING, batch, x_hat, rng, self.config.r1_weight)
        return Terms(losses | {name: self.config.discriminator_weight * loss for name, loss in pay.items()})

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler.renoising(process, steps, config.times if isinstance(config, FDistillConfig) else None)
