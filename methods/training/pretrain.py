"""Pretraining: denoising score matching or flow matching from data. It makes teachers, and fine-tunes given ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Law, LogitNormal, Uniform
from fewstep.losses.denoising import denoising
from fewstep.models.conditioning import Condition
from fewstep.models.players import Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class PretrainConfig(MethodConfig):
    """Settings of pretraining."""

    times: Literal["uniform", "logit_normal"] = "uniform"
    """Law of the training time over the process's range; logit-normal (0, 1) is Stable Diffusion 3's (Esser 2024)."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose condition is replaced by the null one, which guidance needs (Ho & Salimans 2022)."""


class Pretrain(Method):
    """Regress what the network predicts (ε, v or the flow velocity) on x_t = α_t·x_0 + σ_t·ε.

    L = E‖f(x_t, t, c) − target‖², as DDPM's L_simple (Ho et al. 2020, eq. 14), v-prediction (Salimans & Ho 2022) or
    conditional flow matching (Lipman et al. 2023, eq. 23), by the student's own kind of prediction.
    """

    Config: ClassVar[type[MethodConfig]] = PretrainConfig
    family = "training"
    paper = "Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239"
    needs_teacher = False
    few_step = False
    claims = Claims(steps=())

    def __init__(self, config: PretrainConfig, setup: Setup) -> None:
        self.student = setup.student
        self.players = {"student": Player(setup.student.parameters())}
        self.averages = {}
        self.label_dropout = config.label_dropout if setup.student.null is not None else 0.0
        process = setup.student.process
        self.law: Law = LogitNormal(process) if config.times == "logit_normal" else Uniform(process)

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The regression loss at one random time a sample."""
        t = self.law(rng.uniform(len(batch.x)))
        noise = rng.normal(batch.x)
        x_t = self.student.process.add_noise(batch.x, noise, t)
        prediction = self.student(x_t, t, self._dropped(batch.condition, rng, len(batch.x)))
        return Terms({"denoising": denoising(prediction, batch.x, noise, self.student.kind)})

    def _dropped(self, condition: Condition, rng: Rng, batch: int) -> Condition:
        """The condition with a share of the samples made unconditional."""
        if not self.label_dropout:
            return condition
        assert self.student.null is not None
        drop = rng.uniform(batch) < self.label_dropout
        return condition.replaced_where(drop, self.student.null.expand(batch))

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The deterministic sampler of the teacher: DDIM on the trailing grid."""
        return Sampler(process.step_list(steps), "ddim")
