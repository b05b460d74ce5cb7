"""Self-corrected flow distillation: consistency both ways along a trajectory, reflow's correction, and an adversary."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.neighbours import Neighbours
from fewstep.diffusion.process import Flow, Process, expand
from fewstep.diffusion.solvers import Sampler, euler
from fewstep.diffusion.view import viewed
from fewstep.losses.consistency import pseudo_huber_elements
from fewstep.models.adversary import FeatureAdversary
from fewstep.models.conditioning import Condition
from fewstep.models.discriminator import Judged
from fewstep.models.players import Average, Player
from fewstep.models.rollout import one_step
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Critics, Method, Setup, Terms, Turn


class SCFlowConfig(FeatureAdversary, MethodConfig):
    """Settings of self-corrected flow distillation. With the three weights at 0 it is discrete consistency."""

    reach: float = Field(default=0.1, gt=0, le=1)
    """Largest distance in flow time of the two neighbours from t (0.1 in the authors' code)."""
    huber_c: float = Field(default=1e-2, gt=0)
    """Where pseudo-Huber turns from quadratic to linear, per element (0.01 in the code)."""
    truncation: float = Field(default=0.0, ge=0, lt=1)
    """Below this flow time of the cleaner neighbour the target is the data itself (code: 0.4 for the ADM network, 0.1
    for Stable Diffusion). It biases the one-step map: the teacher's own map leaves a residual there."""
    target_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the average of the student that gives the targets (0.9 in the code)."""
    backward_weight: float = Field(default=0.1, ge=0)
    """Weight of the agreement with the noisier neighbour (0.1 in the code)."""
    reflow_weight: float = Field(default=0.1, ge=0)
    """Weight of the correction: on the line from noise to its one-step sample, say that sample (0.1 in the code)."""
    adversarial_weight: float = Field(default=0.1, ge=0)
    """Weight of what the one-step sample pays for being recognised (0.1 in the code)."""
    r1_weight: Annotated[float, Needs("adversarial_weight")] = Field(default=1.0, ge=0)
    """γ of the gradient penalty at real samples (code: 1 for the ADM network, 0 for Stable Diffusion)."""
    sampling: Literal["euler", "renoise"] = "renoise"
    """How later steps go on: Euler's on the flow path (the paper's), or from fresh noise on x̂_0 (consistency's)."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run before the noisier neighbour and the adversary come in (the code: 500 or 1,000 steps)."""


class SCFlow(Method):
    """Agree with both neighbours on the teacher's flow, make straight what one step makes, and fool an adversary.

    L = d(f(x_t, t), sg f⁻(x_r, r)) + b·d(f(x_t, t), sg f⁻(x_q, q)) + c·d(f((1−t)·ŷ + t·ε, t), ŷ) + a·softplus(−D(y)),
    r < t < q on the flow path, f = x̂_0, y = f(ε, 1) and ŷ = sg y; x_r and x_q are Euler steps of the teacher from x_t.
    """

    Config: ClassVar[type[MethodConfig]] = SCFlowConfig
    family = "trajectory"
    paper = (
        "Dao et al. 2024, Self-Corrected Flow Distillation for Consistent One-Step and Few-Step Text-to-Image "
        "Generation, arXiv 2412.16906"
    )
    claims = Claims(steps=(1, 2, 4), one_student=True)

    def __init__(self, config: SCFlowConfig, setup: Setup) -> None:
        assert setup.guided is not None
        self.config, self.student = config, setup.student
        self.f, self.guided = viewed(setup.student, Flow()), setup.guided
        player, follower = Player(self.student.parameters()), self.student.follower("target")
        self.target = viewed(follower, Flow())
        self.players = {"student": player}
        self.averages = {"target": Average(player, config.target_decay, follower.shadow_of(player), False)}
        self.alone = round(config.warmup * setup.run_steps)
        self.judge = config.against(setup.student, setup.teacher, setup.example)
        self.players |= {} if self.judge is None else self.judge.players()
        self.critics = Critics(discriminator=self.judge)

    def turn(self, step: int) -> Turn:
        """The student alone in the warm-up; then the discriminator and it by turns."""
        if step < self.alone:
            return Turn("warm-up", ("student",), self.warm_up_loss)
        if self.judge is not None and (step - self.alone) % 2 == 0:
            return Turn("discriminator", tuple(name for name in self.players if name != "student"), self.judge_loss)
        return Turn("student", ("student",), self.loss)

    def warm_up_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Consistency with the cleaner neighbour, and the correction."""
        return Terms(self._consistency(batch, rng, 0.0) | self._one_step_terms(batch, rng, judged=False))

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """All terms."""
        consistency = self._consistency(batch, rng, self.config.backward_weight)
        return Terms(consistency | self._one_step_terms(batch, rng, judged=self.judge is not None))

    def judge_loss(self, batch: Batch, rng: Rng) -> Terms:
        """Telling data from one-step samples."""
        assert self.judge is not None
        with torch.no_grad():
            fake = Judged(self._one_step(rng.normal(batch.x), batch.condition), batch.condition)
        return Terms(self.judge.pay(Judged(batch.x, batch.condition), fake, rng))

    def _consistency(self, batch: Batch, rng: Rng, backward: float) -> dict[str, Tensor]:
        """The two distances; the teacher's one slope at x_t leads both ways."""
        u, down, up = (rng.uniform(len(batch.x)) for _ in range(3))
        times, noise = Neighbours.within(self.config.reach, u, down, up), rng.normal(batch.x)
        x_t = Flow().add_noise(batch.x, noise, times.t)
        with torch.no_grad():
            slope = viewed(self.guided.drawn(rng, len(x_t)), Flow())(x_t, times.t, batch.condition)
            target = self.target(euler(slope, times.cleaner), times.cleaner, batch.condition).x0
            target = torch.where(expand(times.cleaner < self.config.truncation, target), batch.x.to(target), target)
        output = self.f(x_t, times.t, batch.condition).x0
        losses = {"consistency": self._distance(output, target)}
        if backward:
            with torch.no_grad():
                noisier = self.target(euler(slope, times.noisier), times.noisier, batch.condition).x0
            losses["backward"] = backward * self._distance(output, noisier)
        return losses

    def _one_step_terms(self, batch: Batch, rng: Rng, judged: bool) -> dict[str, Tensor]:
        """The correction and the adversarial loss, of the same one-step samples."""
        if not judged and not self.config.reflow_weight:
            return {}
        noise, losses = rng.normal(batch.x), {}
        with torch.set_grad_enabled(judged):
            y = self._one_step(noise, batch.condition)
        if self.config.reflow_weight:
            t = rng.uniform(len(noise))
            again = self.f(Flow().add_noise(y.detach(), noise, t), t, batch.condition).x0
            losses["reflow"] = self.config.reflow_weight * self._distance(again, y.detach())
        if judged and self.judge is not None:
            fooled = self.judge.fool(Judged(y, batch.condition), rng, Judged(batch.x, batch.condition))
            losses["adversarial"] = self.config.adversarial_weight * fooled
        return losses

    def _one_step(self, noise: Tensor, condition: Condition) -> Tensor:
        return one_step(self.student, self.student.process.step_list(1)[0], noise, condition)

    def _distance(self, output: Tensor, target: Tensor) -> Tensor:
        return pseudo_huber_elements(output, target, self.config.huber_c).mean()

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """DDIM's jumps, which are Euler's steps on the flow path; or x̂_0, re-noised at each following time."""
        assert isinstance(config, SCFlowConfig)
        return Sampler(process.step_list(steps), "ddim" if config.sampling == "euler" else "renoise")
