"""Adversarial self-distillation: the student's n steps against its own n + 1, on top of distribution matching."""

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
from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial
from fewstep.losses.denoising import denoising
from fewstep.losses.score import Weight, distribution_matching
from fewstep.models.adversary import Adversary
from fewstep.models.discriminator import Judged
from fewstep.models.players import Player
from fewstep.models.rollout import Rolled, last_estimate
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs, Window
from fewstep.training.method import Claims, Critics, Method, Setup, Terms, Turn

_ON = Needs("adversarial_weight")


class SelfAdversarialConfig(Adversary, MethodConfig):
    """Settings of adversarial self-distillation. `adversarial_weight: 0` is DMD for several step counts at once."""

    adversarial_weight: float = Field(default=0.1, ge=0)
    """Weight α of the student's adversarial loss beside the distribution matching; the paper does not tell its own."""
    adversarial_loss: Annotated[Adversarial, _ON] = Adversarial.RELATIVISTIC
    """Pair of losses; the paper's is relativistic, each n-step sample against an (n + 1)-step one."""
    r1_weight: Annotated[float, _ON] = Field(default=0.1, ge=0)
    """γ of the gradient penalty at (n + 1)-step samples."""
    r2_weight: Annotated[float, _ON] = Field(default=0.1, ge=0)
    """γ of the gradient penalty at n-step samples."""
    most_steps: int = Field(default=4, ge=2, le=16)
    """N of the schedule of N start times (paper: 4); n steps are its first n, for every n up to N at once."""
    critic_updates: int = Field(default=5, ge=1)
    """Updates of fake score and discriminator for each of the student (5 in Self-Forcing, which the paper follows)."""
    fake_score_lora: int | None = Field(default=None, ge=1)
    """Rank of a LoRA fake score on the teacher's frozen weights; None trains a copy of the student's first weights."""
    renoise: Window = (0.02, 0.98)
    """Window of noise levels of the distribution matching, as shares of the process's range."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which that window's clean edge falls to its place; 0 is the paper's."""
    weight: Weight = "dmd"
    """Per-sample weight of the direction (DMD, eq. 8), or `none`."""


class SelfAdversarial(Method):
    """Make n steps look like n + 1 of the same student, while a score difference ties all of them to the teacher.

    L = E[ω·(x̂_0,fake − x̂_0,real)·∂x̂/∂θ] + α·E[softplus(D_n(sg x̂^(n+1)) − D_n(x̂^n))], both at re-noised samples; D_n is
    one output of heads on the fake score's features for each n < N, and learns to tell x̂^(n+1) from x̂^n.
    """

    Config: ClassVar[type[MethodConfig]] = SelfAdversarialConfig
    family = "adversarial"
    paper = (
        "Yang et al. 2025, Towards One-step Causal Video Generation via Adversarial Self-Distillation, arXiv 2511.01419"
    )
    claims = Claims(one_student=True)

    def __init__(self, config: SelfAdversarialConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.sampler(config, setup.student.process, setup.steps)  # refuses more steps than the student is trained for
        self.times = setup.student.process.step_list(config.most_steps)
        self.config, self.student, self.real_score = config, setup.student, setup.guided
        self.fake_score = replace(setup, steps=config.most_steps).fake_score(config.fake_score_lora)
        student, fake_score = Player(self.student.parameters()), Player(self.fake_score.parameters())
        self.players, self.averages, self.judge = {"student": student, "fake_score": fake_score}, {}, None
        if config.adversarial_weight:
            outputs = config.most_steps - 1
            self.judge = config.discriminator(self.fake_score, setup.example, trains_backbone=False, outputs=outputs)
            self.players |= self.judge.players()
        self.critics = Critics(self.fake_score, self.judge)
        self.all_times, self.run_steps = Uniform(self.student.process), setup.run_steps

    def turn(self, step: int) -> Turn:
        """`critic_updates` turns of fake score and discriminator, then one of the student."""
        if step % (self.config.critic_updates + 1) == self.config.critic_updates:
            window = annealed(self.config.renoise, self.config.anneal, step / self.run_steps)
            law = Uniform(self.student.process, *window)
            return Turn("student", ("student",), partial(self.student_loss, judged_at=law))
        return Turn("critic", tuple(name for name in self.players if name != "student"), self.critic_loss)

    def student_loss(self, batch: Batch, rng: Rng, judged_at: Uniform) -> Terms:
        """Distribution matching of n-step samples, and the adversarial term where n < N."""
        n = 1 + rng.integer(len(self.times))
        made = Rolled(last_estimate(self.student, self.times[:n], batch.x, batch.condition, rng), n - 1)
        x_hat, t = made.x, judged_at(rng.uniform(len(made.x)))
        x_t = self.student.process.add_noise(x_hat.detach(), rng.normal(x_hat), t)
        with torch.no_grad():
            real = self.real_score.drawn(rng, len(x_t))(x_t, t, batch.condition)
            fake = self.fake_score(x_t, t, made.told(batch.condition, self.fake_score))
        losses = {"distribution_matching": distribution_matching(x_hat, fake, real, self.config.weight)}
        if self.judge is not None and n < len(self.times):
            shown, longer = Judged(x_hat, batch.condition), self._estimate(n + 1, batch, rng)
            fooled = self.judge.fool(shown, rng, longer, output=n - 1)
            losses["adversarial"] = self.config.adversarial_weight * fooled
        return Terms(losses, {"score_gap": (fake.x0 - real.x0).abs().mean()})

    def critic_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Denoising on the student's estimates, and telling n + 1 steps from n."""
        n = 1 + rng.integer(len(self.times))
        with torch.no_grad():
            made = Rolled(last_estimate(self.student, self.times[:n], batch.x, batch.condition, rng), n - 1)
        x_hat, condition = made.x, made.told(batch.condition, self.fake_score)
        t, noise = self.all_times(rng.uniform(len(x_hat))), rng.normal(x_hat)
        fake = self.fake_score(self.student.process.add_noise(x_hat, noise, t), t, condition)
        losses = {"denoising": denoising(fake, x_hat, noise, self.fake_score.kind)}
        if self.judge is not None and n < len(self.times):
            shown, longer = Judged(x_hat, batch.condition), self._estimate(n + 1, batch, rng)
            losses |= self.judge.pay(longer, shown, rng, output=n - 1)
        return Terms(losses)

    def _estimate(self, n: int, batch: Batch, rng: Rng) -> Judged:
        """n-step samples from noise of their own, without gradient."""
        with torch.no_grad():
            return Judged(last_estimate(self.student, self.times[:n], batch.x, batch.condition, rng), batch.condition)

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The first `steps` of the N times it was trained at, with fresh noise at each.

        Raises:
            UserError: more steps than that.
        """
        assert isinstance(config, SelfAdversarialConfig)
        if steps > config.most_steps:
            found = f"student.steps={steps} is beyond method.most_steps={config.most_steps}"
            raise UserError(f"{found}; train for at least as many")
        return Sampler(process.step_list(config.most_steps)[:steps], "renoise")
