"""Model guidance: the student's own guidance is added to what it learns from data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import Uniform
from fewstep.errors import UserError
from fewstep.losses.guidance import model_guidance
from fewstep.models.conditioning import Condition
from fewstep.models.players import Average, Player
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Method, Setup, Terms, Turn


class ModelGuidanceConfig(MethodConfig):
    """Settings of model guidance."""

    scale: float | None = Field(default=None, gt=1)
    """Guidance scale s that the student ends at; the w of the paper's target is 1 − 1/s, below 1. The tables call
    the unguided model w = 1, so that their best, 1.5, is w = 0.5 and s = 2. None: `teacher.guidance`."""
    noise_end: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples trained at the process's noise end itself, where every sampler takes its first and most guided
    step; 0 is the paper's uniform law of times."""
    label_dropout: float = Field(default=0.1, gt=0, lt=1)
    """Share of samples that train the unconditional prediction, by the plain target (table 4: 0.1 is best)."""
    target: Literal["ema", "self"] = "ema"
    """Whose guidance is added: an average's of the student (the paper's eq. 18), or the student's own (algorithm 1)."""
    target_decay: Annotated[float, Needs("target", "ema")] = Field(default=0.99, ge=0, lt=1)
    """Decay of that average. The guidance approaches its scale by a factor w for each time that the average takes."""


class ModelGuidance(Method):
    """Regress the noise plus the student's own guidance, so that it ends at the guided prediction.

    L = E‖ε_θ(x_t, t, c) − ε − w·sg[ε̄_θ(x_t, t, c) − ε̄_θ(x_t, t, ∅)]‖² (Tang et al. 2025, eq. 17 and 18; 19 and 20 for
    flows), in the student's own parametrisation, and plain ε where c is dropped. The fixed point is s = 1/(1 − w).
    """

    Config: ClassVar[type[MethodConfig]] = ModelGuidanceConfig
    family = "guidance"
    paper = "Tang et al. 2025, Diffusion Models without Classifier-free Guidance, arXiv 2502.12154"
    needs_teacher = False
    few_step = False
    claims = Claims(steps=(4, 8), one_student=True, guided=True)

    def __init__(self, config: ModelGuidanceConfig, setup: Setup) -> None:
        if setup.student.null is None:
            raise UserError("student: guidance comes from a conditional network, and this one takes no condition")
        self.config, self.null, self.scale = config, setup.student.null, _scale(config, setup)
        self.student = self.target = setup.student
        self.law = Uniform(self.student.process)
        player = Player(self.student.parameters())
        self.players, self.averages = {"student": player}, {}
        if config.target == "ema":
            self.target = self.student.follower("target")
            self.averages = {"target": Average(player, config.target_decay, self.target.shadow_of(player), False)}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The regression on the guided target; where the condition is dropped, the difference is zero by itself."""
        size = len(batch.x)
        t, noise = self._times(rng.uniform(size)), rng.normal(batch.x)
        x_t = self.student.process.add_noise(batch.x, noise, t)
        dropped = rng.uniform(size) < self.config.label_dropout
        condition = batch.condition.replaced_where(dropped, self.null.expand(size))
        said = self.student(x_t, t, condition)
        difference = self._difference(said, condition)
        return Terms(
            {"model_guidance": model_guidance(said, difference, batch.x, noise, self.scale)},
            {"difference": difference.abs().mean()},
        )

    @torch.no_grad()
    def _difference(self, said: Prediction, condition: Condition) -> Tensor:
        """What the condition changes in the target network's output `(B, *)`."""
        x_t, t, null = said.x_t, said.t, condition.nulled(self.null, len(said.x_t))
        if self.config.target == "self":  # said already is its conditional half
            return said.detach().as_kind(said.kind) - self.student(x_t, t, null).as_kind(said.kind)
        both = self.target(torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat([condition, null]))
        conditional, unconditional = both.as_kind(said.kind).chunk(2)
        return conditional - unconditional

    def _times(self, u: Tensor) -> Tensor:
        """Uniform times and, for the highest of the uniforms `u` `(B,)`, the noise end."""
        return self.law((u / (1 - self.config.noise_end)).clamp_max(1))

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """The deterministic sampler of a teacher: DDIM on the trailing grid, without guidance."""
        return Sampler(process.step_list(steps), "ddim")


def _scale(config: ModelGuidanceConfig, setup: Setup) -> float:
    """The method's own scale, or the run's."""
    given = 1.0 if setup.guided is None else setup.guided.scale
    if not isinstance(given, float):
        raise UserError(
            "teacher.guidance: a range is given, but a student of model guidance ends at one scale; give one"
        )
    if config.scale is None:
        if not given > 1:
            raise UserError(f"method.scale: missing, and teacher.guidance is {given:g}; give one of them, above 1")
        return given
    if given not in (1.0, config.scale):
        raise UserError(f"method.scale: {config.scale:g} given, but teacher.guidance is {given:g}; leave one out")
    return config.scale
