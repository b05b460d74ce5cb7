"""What a method is: its players, whose turn it is at a step, and the loss of that turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser, Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.discriminator import Discriminator
from fewstep.models.guidance import Guided
from fewstep.models.players import Average, Player
from fewstep.models.rollout import hears_step
from fewstep.registry import MethodConfig
from fewstep.rng import Rng


@dataclass(frozen=True)
class Terms:
    """The weighted scalar terms of one loss, by name, and figures worth logging beside them."""

    losses: Mapping[str, Tensor]
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Their sum, what is differentiated."""
        return torch.stack(tuple(self.losses.values())).sum()

    def detach(self) -> Terms:
        """The same numbers outside the autograd graph."""
        return Terms(
            {name: value.detach() for name, value in self.losses.items()},
            {name: value.detach() for name, value in self.figures.items()},
        )


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with optimizers, learning rates and averages of its own: one halving, say.

    Attributes:
        start: its first step.
        end: the step after its last.
    """

    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """Who trains at a step and by which loss: decided here alone, read by the loop for gradients and optimizers.

    Attributes:
        name: for logs.
        trains: the players whose parameters move; all others are frozen.
        loss: the terms on one batch, with the run's random stream.
        stage: that the step lies in; None where the whole run is one.
        resting: averages that stay as they are, though their player moves.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Batch, Rng], Terms]
    stage: Stage | None = None
    resting: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What a method is built from.

    Attributes:
        student: the network to train, starting from the teacher's weights unless made from scratch.
        teacher: the frozen teacher without guidance, or None where the method learns from data.
        guided: the teacher under the run's guidance, or None.
        steps: network evaluations per sample the student is trained for.
        run_steps: optimizer steps of the whole run, for schedules.
        example: one sample `(1, *)` of the data with its condition, for shapes.
    """

    student: NetworkDenoiser
    teacher: Denoiser | None
    guided: Guided | None
    steps: int
    run_steps: int
    example: Batch

    def fake_score(self, lora: int | None) -> NetworkDenoiser:
        """A trainable score of the student's samples: a copy of the teacher, or a LoRA on its frozen weights.

        Of a closed-form teacher the student's first weights are the copy: they were fitted to it. Of a student of
        several steps, the score is given an input for the step that made a sample (`Rolled.told`).

        Raises:
            UserError: a LoRA on a teacher that is no network, or a copy of one whose weights adapters share.
        """
        if lora is not None:
            made = self.frozen_teacher().lora_view("fake_score", lora)
        else:
            made = self.teacher.copy() if isinstance(self.teacher, NetworkDenoiser) else self.student.copy()
        return hears_step(made) if self.steps > 1 and made.family.time_embedding else made

    def frozen_teacher(self) -> NetworkDenoiser:
        """The teacher as a network, for adapters and features.

        Raises:
            UserError: it is a closed form.
        """
        if not isinstance(self.teacher, NetworkDenoiser):
            raise UserError("teacher: adapters and feature taps need a network, this teacher is a closed form")
        return self.teacher


@dataclass(frozen=True)
class Critics:
    """Who judges the student's samples, for the health panel.

    Attributes:
        fake_score: the trained score of the student's samples, if there is one.
        discriminator: if there is one.
        teacher: under the run's guidance; put in where the method is built.
    """

    fake_score: NetworkDenoiser | None = None
    discriminator: Discriminator | None = None
    teacher: Guided | None = None


@dataclass(frozen=True)
class Claims:
    """What a method promises of its students, and `fewstep verify` holds it to.

    Attributes:
        steps: network evaluations per sample at which its students are good; none: it makes teachers.
        one_student: the training does not depend on `student.steps`; one student serves them all.
        exact_map: the student follows the teacher's own trajectories, so that its error to the exact flow map counts.
        guided: the student imitates the guided teacher with one evaluation a step, at the teacher's steps.
        pairs: it learns from the teacher's stored pairs, and its config has a field `pairs`.
        follows_ode: the student is the velocity of an ODE at every time, which a solver may follow in any number of
            steps, so that it can be a teacher; those of `guided` and those that are no few-step students are besides.
    """

    steps: tuple[int, ...] = (1, 2, 4)
    one_student: bool = False
    exact_map: bool = False
    guided: bool = False
    pairs: bool = False
    follows_ode: bool = False


class Method(ABC):
    """One published method. Final classes only: families share functions, never a parent other than this one.

    Attributes:
        Config: its settings, a frozen model with documented fields.
        family: the folder it stands in.
        paper: author, year, title, arXiv number.
        needs_teacher: whether it cannot run from data alone.
        few_step: whether its student is sampled in `student.steps` steps; a pretrained network follows an ODE solver.
        claims: what `fewstep verify` holds it to.
        players: who may train, by name; `student` is always among them.
        averages: weights that follow a player, by name, stepped after each of its turns.
        critics: who judges its student's samples; nothing in training reads it.
    """

    Config: ClassVar[type[MethodConfig]]
    family: ClassVar[str]
    paper: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    few_step: ClassVar[bool] = True
    claims: ClassVar[Claims] = Claims()
    critics: Critics = Critics()

    student: NetworkDenoiser
    players: Mapping[str, Player]
    averages: Mapping[str, Average]

    @abstractmethod
    def __init__(self, config: MethodConfig, setup: Setup) -> None: ...

    @abstractmethod
    def turn(self, step: int) -> Turn:
        """The turn at step `step`, counted from 0."""

    @staticmethod
    @abstractmethod
    def sampler(config: MethodConfig, process: Process, steps: int) -> Sampler:
        """How a trained student makes samples in `steps` network evaluations."""
