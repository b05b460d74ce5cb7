"""GDD: a diffusion model made a one-step generator by an adversary alone, whole (GDD) or but for its norms (GDD-I)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Law, Uniform, annealed
from fewstep.errors import UserError
from fewstep.models.adversary import Adversary
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.discriminator import Judged
from fewstep.models.external_features import TAPS, external_features
from fewstep.models.players import Player
from fewstep.models.rollout import backward_simulation
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Critics, Method, Setup, Terms, Turn

_FROZEN = {"conv", "conv1", "conv2", "to_out", "proj_in", "proj_out", "ff"}


class GDDConfig(Adversary, MethodConfig):
    """Settings of GDD."""

    train: Literal["all", "innate"] = "all"
    """`all` is GDD; `innate`, GDD-I, freezes the blocks' convolutions and output projections (of transformers the
    feed-forward layers, of the network of `fewstep verify` the residual layers): norms, embeddings, queries, keys,
    values, shortcuts, first and last layers train. Under `student.lora` it leaves out the adapters of those layers."""
    features: Literal["student_copy", "teacher", "efficientnet-lite0"] = "student_copy"
    """What the discriminator's heads read: a copy of the student's first weights (under `student.lora` one more adapter
    on its base), the frozen teacher, or an ImageNet classifier at four depths (the paper's: Lite0 with VGG16-BN or
    DeiT), for pixels alone."""
    train_features: Annotated[bool, Needs("features", "student_copy")] = True
    """Whether the discriminator's loss trains the copy too; the paper's features are frozen."""
    feature_size: Annotated[int, Needs("features", "efficientnet-lite0")] = Field(default=224, ge=32, multiple_of=32)
    """Pixels along each side that the classifier sees (224)."""
    discriminator_updates: int = Field(default=1, ge=1)
    """Updates of the discriminator for each of the student (1)."""
    noise_levels: Literal["logit_normal", "uniform"] = "uniform"
    """Law of the noise that samples are judged under; the paper judges clean ones: `judged_window: [0, 0.01]`."""
    anneal: Annotated[float, Needs("noise_levels", "uniform")] = Field(default=0.0, ge=0, le=1)
    """Share of the run over which the window's clean edge falls to its place; 0 is a fixed window."""


class GDD(Method):
    """Make the student's samples and data the same to a discriminator, with no score and no teacher in the loss.

    The student descends E[softplus(−D(G(σ_max·z)))], D ascends E[ln s(D(x))] + E[ln(1 − s(D(G(σ_max·z))))], s the
    logistic function, with a gradient penalty at data (Zheng & Yang 2024, section 3.2).
    """

    Config: ClassVar[type[MethodConfig]] = GDDConfig
    family = "distribution"
    paper = "Zheng & Yang 2024, Diffusion Models Are Innate One-Step Generators, arXiv 2405.20750"
    needs_teacher = False
    claims = Claims(steps=(1,))

    def __init__(self, config: GDDConfig, setup: Setup) -> None:
        if not config.adversarial_weight:
            raise UserError("method.adversarial_weight: 0 given; the adversary is all that gdd learns from")
        self.config, self.student = config, setup.student
        backbone, trained = _features(config, setup), config.features == "student_copy" and config.train_features
        if config.features == "efficientnet-lite0" and not config.taps:
            config = config.model_copy(update={"taps": TAPS})
        self.judge = config.discriminator(backbone, setup.example, trained)
        self.players = {"student": _student(config, self.student), "discriminator": Player.of(self.judge.heads)}
        self.players |= {"features": Player(backbone.parameters())} if trained else {}
        self.critics = Critics(discriminator=self.judge)
        self.averages = {}
        self.times, self.run_steps = self.student.process.step_list(setup.steps), setup.run_steps

    def turn(self, step: int) -> Turn:
        """`discriminator_updates` turns of the discriminator, then one of the student."""
        law = self._law(step)
        if step % (self.config.discriminator_updates + 1) == self.config.discriminator_updates:
            return Turn("student", ("student",), partial(self.student_loss, judged_at=law))
        others = tuple(name for name in self.players if name != "student")
        return Turn("discriminator", others, partial(self.judge_loss, judged_at=law))

    def _law(self, step: int) -> Law:
        if self.config.noise_levels != "uniform":
            return self.judge.times
        window = annealed(self.config.judged_window, self.config.anneal, step / self.run_steps)
        return Uniform(self.student.process, *window)

    def student_loss(self, batch: Batch, rng: Rng, judged_at: Law) -> Terms:
        """What being recognised costs."""
        judge = replace(self.judge, times=judged_at)
        fake = Judged(self._rollout(batch, rng), batch.condition)
        fooled = judge.fool(fake, rng, Judged(batch.x, batch.condition))
        return Terms({"adversarial": self.config.adversarial_weight * fooled})

    def judge_loss(self, batch: Batch, rng: Rng, judged_at: Law) -> Terms:
        """Telling data from the student's samples."""
        with torch.no_grad():
            fake = Judged(self._rollout(batch, rng), batch.condition)
        real = Judged(batch.x, batch.condition)
        return Terms(replace(self.judge, times=judged_at).pay(real, fake, rng))

    def _rollout(self, batch: Batch, rng: Rng) -> Tensor:
        return backward_simulation(self.student, self.times, batch.x, batch.condition, rng).x

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """x̂_0, re-noised with fresh noise at each following time."""
        return Sampler(process.step_list(steps), "renoise")


def _features(config: GDDConfig, setup: Setup) -> NetworkDenoiser:
    match config.features:
        case "teacher":
            if setup.teacher is None:
                raise UserError("method.features: 'teacher' given, and teacher.path names none")
            return setup.frozen_teacher()
        case "efficientnet-lite0":
            return external_features(setup.student, setup.example, config.feature_size)
        case _:
            first = setup.student.branch("features")
            Player(first.parameters()).require_grad(config.train_features)
            return first


def _student(config: GDDConfig, student: NetworkDenoiser) -> Player:
    """The parameters that train; all others of the network are frozen here."""
    parameters = student.parameters()
    if config.train == "all":
        return Player(parameters)
    frozen = [name for name in parameters if _in_a_convolution(name)]
    if not frozen:
        raise UserError("method.train: 'innate' given, and the network has no block with a layer to freeze; give 'all'")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return Player({name: p for name, p in parameters.items() if name not in frozen})


def _in_a_convolution(name: str) -> bool:
    parts = name.split(".")
    in_block = parts[0].endswith(("blocks", "block")) and not _FROZEN.isdisjoint(parts)
    return in_block or parts[0] == "middle"
