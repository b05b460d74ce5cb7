"""Adversarial distillation: ADD and LADD as settings of one objective."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.pairs import Pairs
from fewstep.diffusion.process import Process, expand
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.diffusion.times import Uniform
from fewstep.errors import UserError
from fewstep.models.adversary import FeatureAdversary
from fewstep.models.discriminator import Judged
from fewstep.models.players import Player
from fewstep.models.rollout import last_estimate
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Critics, Method, Setup, Terms, Turn


class AdversarialConfig(FeatureAdversary, MethodConfig):
    """Settings of adversarial distillation; the defaults are LADD's, with a small discriminator.

    ADD: distillation_weight 2.5, adversarial_loss hinge, penalty features, r1_weight 1e-5, rollout noised_data.
    """

    discriminator_updates: int = Field(default=1, ge=1)
    """Updates of the discriminator for each of the student (1 in both papers)."""
    real: Annotated[Literal["data", "teacher"], Needs("adversarial_weight")] = "data"
    """What counts as real: data (ADD), or the teacher's own samples under the run's guidance (LADD)."""
    real_steps: Annotated[int, Needs("real", "teacher")] = Field(default=4, ge=1)
    """DDIM steps of the teacher's samples where no pairs are stored."""
    pairs: Annotated[Path | None, Needs("real", "teacher")] = None
    """The teacher's stored samples, made by `fewstep pairs`: cheaper, and of as many steps as they were made with."""
    distillation_weight: float = Field(default=0.0, ge=0)
    """λ of the teacher's denoising of the student's sample; ADD: 2.5, LADD: 0."""
    distillation_time: Annotated[Literal["alpha", "one"], Needs("distillation_weight")] = "alpha"
    """c(t): α_t, ADD's exponential weighting, or 1."""
    rollout: Literal["backward_simulation", "noised_data"] = "backward_simulation"
    """What later steps of a multi-step student are fed in training; both papers noise data."""


class AdversarialDistillation(Method):
    """Fool a discriminator that reads a score network's features, with the teacher's denoising as an anchor.

    L = w·E[g(D(x̂_s, s))] + λ·E[c(t)·‖x̂ − sg x̂_0,teacher(x̂_t, t)‖²/D] (ADD, eq. 2 and 5), where x̂ is the student's
    sample, x̂_s and x̂_t its noised selves and g the generator's loss; D learns real from x̂ at noise levels s (LADD).
    """

    Config: ClassVar[type[MethodConfig]] = AdversarialConfig
    family = "adversarial"
    paper = (
        "Sauer et al. 2023, Adversarial Diffusion Distillation, arXiv 2311.17042; Sauer et al. 2024 (LADD), "
        "arXiv 2403.12015"
    )
    claims = Claims(steps=(1, 2))  # four steps miss the bar of `fewstep verify` by a little

    def __init__(self, config: AdversarialConfig, setup: Setup) -> None:
        assert setup.guided is not None
        if not config.adversarial_weight and not config.distillation_weight:
            raise UserError("method.adversarial_weight: 0, and so is distillation_weight; nothing would be learned")
        self.config, self.student, self.teacher = config, setup.student, setup.guided
        self.judge = config.against(setup.student, setup.teacher, setup.example, outputs=setup.steps)
        judges = {} if self.judge is None else self.judge.players()
        self.players, self.averages = {"student": Player(self.student.parameters()), **judges}, {}
        self.critics = Critics(discriminator=self.judge)
        process = self.student.process
        self.times, self.all_times = process.step_list(setup.steps), Uniform(process)
        self.pairs = Pairs.open(config.pairs, float(config.pairs is not None), setup.example)

    def turn(self, step: int) -> Turn:
        """`discriminator_updates` turns of the discriminator, then one of the student."""
        updates = self.config.discriminator_updates if self.judge is not None else 0
        if step % (updates + 1) == updates:
            return Turn("student", ("student",), self.student_loss)
        return Turn("discriminator", tuple(name for name in self.players if name != "student"), self.judge_loss)

    def student_loss(self, batch: Batch, rng: Rng) -> Terms:
        """The generator's loss, and the distance to the teacher's denoising of the sample."""
        n, losses = rng.integer(len(self.times)), {}
        x_hat = self._rollout(n, batch, rng)
        if self.judge is not None:
            fake = Judged(x_hat, batch.condition)
            fooled = self.judge.fool(fake, rng, self._real(batch, rng), output=n)
            losses["adversarial"] = self.config.adversarial_weight * fooled
        if self.config.distillation_weight:
            losses["distillation"] = self.config.distillation_weight * self._distillation(x_hat, batch, rng)
        return Terms(losses)

    def judge_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Telling real samples from the student's."""
        assert self.judge is not None
        n = rng.integer(len(self.times))
        with torch.no_grad():
            fake = Judged(self._rollout(n, batch, rng), batch.condition)
        return Terms(self.judge.pay(self._real(batch, rng), fake, rng, output=n))

    def _real(self, batch: Batch, rng: Rng) -> Judged:
        if self.config.real == "data":
            return Judged(batch.x, batch.condition)
        if self.pairs is not None:
            pair = self.pairs.draw(rng, len(batch.x))
            return Judged(pair.x0, pair.condition)
        sampler = Sampler.of(self.student.process, self.config.real_steps, "ddim")
        teacher = self.teacher.drawn(rng, len(batch.x))
        with torch.no_grad():
            return Judged(sample(teacher, sampler, rng.normal(batch.x), batch.condition), batch.condition)

    def _distillation(self, x_hat: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """c(t)·‖x̂ − sg x̂_0,teacher(x̂_t, t)‖² of each element (ADD, eq. 5)."""
        t, process = self.all_times(rng.uniform(len(x_hat))), self.student.process
        with torch.no_grad():
            x_t = process.add_noise(x_hat, rng.normal(x_hat), t)
            target = self.teacher.drawn(rng, len(x_t))(x_t, t, batch.condition).x0
        weight = process.alpha(t) if self.config.distillation_time == "alpha" else torch.ones_like(t)
        return (expand(weight, x_hat) * (x_hat - target).square()).mean()

    def _rollout(self, n: int, batch: Batch, rng: Rng) -> Tensor:
        """The estimate of step n, counted from 0. Each step has an output of the heads to itself: of one for all, only
        the mixture of the steps' samples would have to look real, and each could keep to some of the modes.
        """
        if self.config.rollout == "backward_simulation":
            return last_estimate(self.student, self.times[: n + 1], batch.x, batch.condition, rng)
        process, noise = self.student.process, rng.normal(batch.x)
        t = process.times(self.times[n], batch.x)
        x = process.add_noise(batch.x, noise, t) if n else process.prior(noise, self.times[0])
        return self.student(x, t, batch.condition).x0

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler(process.step_list(steps), "renoise")
