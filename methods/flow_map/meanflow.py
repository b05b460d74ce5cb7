"""MeanFlow: the average velocity of a jump, by an identity that one forward derivative states."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.derivative import STEP, Derivative, along
from fewstep.diffusion.process import Flow, Process, expand
from fewstep.diffusion.solvers import Sampler
from fewstep.diffusion.times import LogitNormal
from fewstep.diffusion.view import viewed
from fewstep.errors import UserError
from fewstep.losses.tangent import adaptive, average_velocity
from fewstep.models.conditioning import Condition
from fewstep.models.players import Player
from fewstep.models.two_time import SpanLaw, TwoTime, WithAtom, noise_end, two_time
from fewstep.registry import MethodConfig
from fewstep.rng import Rng
from fewstep.section import Needs
from fewstep.training.method import Claims, Method, Setup, Terms, Turn

LATEST = 0.999
"""The noise end for a derivative in flow time: at 1 a network of the noise-to-signal ratio, such as one of VP, changes
infinitely fast."""


class MeanFlowConfig(MethodConfig):
    """Settings of MeanFlow; the defaults distil a teacher, whose velocities are exact where the paper's are noisy."""

    teacher: bool = True
    """Whether the velocities are the guided teacher's, or those of the data's own noise (the paper's)."""
    diagonal: float = Field(default=0.25, ge=0, le=1)
    """Share of the batch with r = t, where MeanFlow is flow matching: little, for a student that is its teacher at the
    start; 0.75 in the paper."""
    time_mean: float = 0.0
    """Mean of the logit of both times; −0.4 in the paper."""
    time_std: float = Field(default=2.5, gt=0)
    """Its standard deviation, wide enough for both ends of a whole jump; 1 in the paper."""
    noise_end: float = Field(default=0.1, ge=0, lt=1)
    """Share of the times that is the noise end (t = 0.999 at most), where every sampler starts; 0 in the paper."""
    power: float = Field(default=1.0, ge=0)
    """p of the adaptive weight (e + c)^−p; 0 is the squared error."""
    c: float = Field(default=1.0, gt=0)
    """c of that weight, for the mean error e of an element. The paper's 0.01 is of a sum over thousands of elements;
    in few dimensions a small c makes the mean that is to be learnt a median."""
    omega: float = 1.0
    """ω of guidance in training from data: v_g = ω·v + (1 − ω − κ)·u(x, t, t|∅) + κ·u(x, t, t|c), of scale
    ω/(1 − κ); a teacher's is `teacher.guidance`."""
    kappa: float = Field(default=0.0, ge=0, lt=1)
    """κ of the same; 0.5 in the paper's code."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples without their condition, where there is guidance in training."""
    damping: float = Field(default=1.0, ge=0)
    """d of the share 1/(1 + d·(t − r)/(t·(1 − t))) of the way from u to its target; 0, all of it, is the paper's. Near
    the noise end a network of the noise-to-signal ratio has a huge du/dt. Where the training ends stays the same."""
    derivative: Derivative = "jvp"
    """How u is differentiated along the ODE; `central_difference` where a kernel has no forward derivative, and for a
    teacher trained at whole indices only, which is rough in between."""
    step: Annotated[float, Needs("derivative", "central_difference")] = Field(default=STEP, gt=0, lt=1)
    """Of that difference, in the log noise-to-signal ratio; 0.1 is some ten of 1,000 indices."""


class MeanFlow(Method):
    """Regress the average velocity onto the ODE's velocity less what the jump's length makes of its change.

    L = |u_θ(x_t, t, r) − sg(v − (t − r)·du_θ/dt)|², divided by sg(|·|² + c)^p, where du_θ/dt is the forward derivative
    along (v, 1, 0) in (x, t, r) (Geng et al. 2025, eq. 6 and algorithm 1).
    """

    Config: ClassVar[type[MethodConfig]] = MeanFlowConfig
    family = "flow_map"
    paper = "Geng et al. 2025, Mean Flows for One-step Generative Modeling, arXiv 2505.13447"
    needs_teacher = False
    claims = Claims(one_student=True, exact_map=True)

    def __init__(self, config: MeanFlowConfig, setup: Setup) -> None:
        if config.teacher and setup.guided is None:
            raise UserError("teacher.path: missing; distillation needs one, method.teacher=false learns from data")
        self.guides = (config.omega, config.kappa) != (1.0, 0.0)
        if self.guides and (config.teacher or setup.student.null is None):
            lacks = "it needs method.teacher=false" if config.teacher else "the student takes no condition"
            raise UserError(f"method.omega, method.kappa: {config.omega:g} and {config.kappa:g} given; {lacks}")
        self.config, self.student = config, two_time(setup.student)
        self.map = TwoTime.of(self.student)
        self.guided = setup.guided if config.teacher else None
        law = LogitNormal(Flow(), config.time_mean, config.time_std)
        end = min(noise_end(self.student.process), LATEST)
        self.law = SpanLaw(WithAtom(law, config.noise_end, end), config.diagonal)
        self.players, self.averages = {"student": Player(self.student.parameters())}, {}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), self.loss)

    def loss(self, batch: Batch, rng: Rng) -> Terms:
        """The weighted squared error of the average velocity; the derivative is taken of the jumps alone."""
        size, noise = len(batch.x), rng.normal(batch.x)
        pair = self.law.pairs(rng.uniform(size), rng.uniform(size))
        x_t, condition = Flow().add_noise(batch.x, noise, pair.t), batch.condition
        target = self._velocity(x_t, pair.t, noise - batch.x, condition, rng)
        if self.guides:
            assert self.student.null is not None
            dropped = rng.uniform(size) < self.config.label_dropout
            condition = condition.replaced_where(dropped, self.student.null.expand(size))
            target = torch.where(expand(dropped, target), noise - batch.x, target)
        jumps = self.law.parts(size, rng.device).jumps
        if len(jumps):
            at = x_t[jumps], pair.t[jumps], pair.s[jumps], target[jumps], condition.rows(jumps)
            target = target.index_copy(0, jumps, self._target(*at))
        output = self.map.velocity(x_t, pair.t, pair.s, condition)
        return Terms({"average_velocity": adaptive(output, target, self.config.power, self.config.c).mean()})

    @torch.no_grad()
    def _velocity(self, x: Tensor, t: Tensor, slope: Tensor, condition: Condition, rng: Rng) -> Tensor:
        """v: the teacher's, or the slope ε − x_0 of the noised sample, under the student's own guidance."""
        if self.guided is not None:
            return viewed(self.guided.drawn(rng, len(x)), Flow())(x, t, condition).velocity
        if not self.guides:
            return slope
        assert self.student.null is not None
        both = Condition.cat([condition, condition.nulled(self.student.null, len(x))])
        twice = torch.cat([t, t])
        conditional, null = self.map.velocity(torch.cat([x, x]), twice, twice, both).chunk(2)
        omega, kappa = self.config.omega, self.config.kappa
        return omega * slope + (1 - omega - kappa) * null + kappa * conditional

    def _target(self, x: Tensor, t: Tensor, r: Tensor, v: Tensor, condition: Condition) -> Tensor:
        """A share of the way from u to v − (t − r)·du/dt, with du/dt in steps of the log noise ratio."""
        unit = t * (1 - t)  # dt of a unit of that logarithm
        span = (t - r) / unit

        def average(x: Tensor, t: Tensor) -> Tensor:
            return self.map.velocity(x, t, r, condition)

        direction = expand(unit, x) * v, unit
        here = along(average, (x, t), direction, self.config.derivative, self.config.step)
        target, share = average_velocity(v, here.slope, span), 1 / (1 + self.config.damping * span)
        return here.value + expand(share, x) * (target - here.value)

    @staticmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """A jump from each time to the next, the last one to clean data."""
        return Sampler(process.step_list(steps), "flow_map")
