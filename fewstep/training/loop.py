"""The training loop: a generator that takes turns and yields a report a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.config import RunConfig
from fewstep.data.batch import Batch
from fewstep.data.loader import Loader
from fewstep.rng import Rng
from fewstep.training.clock import Clock
from fewstep.training.method import Method, Stage, Terms, Turn
from fewstep.training.offload import Offload
from fewstep.training.optim import PlayerOptimizer, lr_factor


@dataclass(frozen=True)
class Report:
    """One finished step. Tensors stay on the device: reading them is the caller's choice of when to wait.

    Attributes:
        step: steps done so far, this one included.
        turn: the turn's name.
        terms: its detached losses and figures.
        gradient_norms: of each player that moved, before clipping.
    """

    step: int
    turn: str
    terms: Terms
    gradient_norms: Mapping[str, Tensor]


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    Attributes:
        config: the resolved run.
        method: players and averages.
        optimizers: by player.
        loader: endless batches, with a position.
        rng: the run's random stream.
        accelerator: device, precision and processes.
        step: steps done.
        offload: of what a turn does not use, where asked for.
        clock: of the losses and their backward passes; off unless somebody reads it.
    """

    config: RunConfig
    method: Method
    optimizers: Mapping[str, PlayerOptimizer]
    loader: Loader
    rng: Rng
    accelerator: Accelerator
    step: int = 0
    offload: Offload | None = None
    clock: Clock = field(default_factory=Clock, repr=False)
    _batches: Iterator[Batch] | None = field(default=None, repr=False)

    def next_batch(self) -> Batch:
        """The next micro-batch, on the device."""
        if self._batches is None:
            self._batches = iter(self.loader)
        return next(self._batches).to(self.accelerator.device)


def train(state: TrainState) -> Iterator[Report]:
    """Run the remaining steps: one turn each, over accumulated micro-batches."""
    training: tuple[str, ...] | None = None
    while state.step < state.config.train.steps:
        turn = state.method.turn(state.step)
        if turn.trains != training:
            for name, optimizer in state.optimizers.items():
                optimizer.player.require_grad(name in turn.trains)
            training = turn.trains
        if state.offload is not None:
            state.offload.begin(turn)
        if turn.stage is not None and state.step == turn.stage.start:
            _begin_stage(state, turn)
        terms = _accumulate(state, turn)
        norms = _update(state, turn)
        state.step += 1
        if state.offload is not None:
            state.offload.end()
        yield Report(state.step, turn.name, terms, norms)


def _begin_stage(state: TrainState, turn: Turn) -> None:
    """Optimizers forget what they gathered, and every average, a resting one too, takes the weights of now."""
    for name in turn.trains:
        state.optimizers[name].forget()
    for average in state.method.averages.values():
        average.restart()


def _accumulate(state: TrainState, turn: Turn) -> Terms:
    """Gradients of the turn's loss, averaged over the step's micro-batches; the last one's terms."""
    count = state.config.train.accumulate
    terms = Terms({})
    if "graphs" in state.config.train.compile_modes:
        torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the last step put out may be overwritten
    for _ in range(count):
        batch = state.next_batch()
        state.clock.start()
        with state.accelerator.autocast():
            terms = turn.loss(batch, state.rng)
        (terms.total * _finite(terms.total) / count).backward()
        state.clock.stop()
    return terms.detach()


def _finite(loss: Tensor) -> Tensor:
    """1 `()`, or NaN where a loss is not finite: then its gradients are not either, and no process takes the step.

    Of themselves they may well be finite, where what overflowed does not depend on a weight.
    """
    return 1 + 0 * loss.detach()


def _update(state: TrainState, turn: Turn) -> Mapping[str, Tensor]:
    """Step the players of the turn, and the averages that follow them."""
    optim = state.config.optim
    stage = turn.stage or Stage(0, state.config.train.steps)
    factor = lr_factor(optim, state.step - stage.start, stage.end - stage.start)
    norms = {name: state.optimizers[name].step(factor, optim.clip) for name in turn.trains}
    moved = {id(state.method.players[name]) for name in turn.trains}
    for name, average in state.method.averages.items():
        if id(average.source) in moved and name not in turn.resting:
            average.update()
    return norms
