"""Numbers that are not finite, in a step's loss and in one of several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.models.shards import whole
from fewstep.training.loop import TrainState
from fewstep.training.method import Terms, Turn
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, assert_same, begin, config, everything, go

BAD = 2  # the student's first in dmd2


def spoilt(state: TrainState, spoil: Callable[[Terms], Terms]) -> None:
    """Change what the loss of step `BAD` says."""
    turn_of = state.method.turn

    def turn(step: int) -> Turn:
        turn = turn_of(step)
        return turn if step != BAD else replace(turn, loss=lambda batch, rng: spoil(turn.loss(batch, rng)))

    state.method.turn = turn


def added(value: float) -> Callable[[Terms], Terms]:
    """A term more, of which no weight knows."""
    return lambda terms: replace(terms, losses={**terms.losses, "spoilt": torch.tensor(value)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_moves_nothing_though_its_gradient_is(tmp_path, value):
    state = begin(config(METHODS["consistency"], tmp_path, train={"accumulate": 2, "steps": BAD + 1}))
    go(state, BAD)
    before = everything(state)
    spoilt(state, added(value))
    go(state)
    after = everything(state)
    assert state.optimizers["student"].skips.read() == [1, 1]
    players = [key for key in before if key.startswith("student/")]
    assert [key for key in players if not torch.equal(before[key], after[key])] == []


def test_a_finite_loss_is_left_as_it_is(tmp_path):
    one, other = (begin(config(METHODS["consistency"], tmp_path / name)) for name in "ab")
    spoilt(other, added(1.0))
    go(one)
    go(other)
    assert_same(everything(one), everything(other))


def one_of_two(folder: Path) -> None:
    """The second process alone meets a NaN, in each way of lying in two processes."""
    for shard in ("none", "full"):
        state = begin_rank(config(METHODS["dmd2"], folder / "run", train={"shard": shard}))
        if dist.get_rank() == 1:
            spoilt(state, added(float("nan")))
        go(state)
        skips = {name: torch.tensor(one.skips.read()) for name, one in state.optimizers.items()}
        save_file({**weights(state), **skips}, folder / f"{shard}-{dist.get_rank()}.safetensors")


def weights(state: TrainState) -> dict[str, Tensor]:
    players = state.method.players.items()
    return {f"{name}/{k}": whole(p).clone() for name, player in players for k, p in player.parameters.items()}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_nan_in_one_process_is_left_out_by_all(tmp_path):
    assert launch(one_of_two, tmp_path, seconds=120) == [0, 0]
    alone = begin(config(METHODS["dmd2"], tmp_path / "alone"))
    spoilt(alone, added(float("nan")))
    go(alone)
    expected = weights(alone)
    trains = alone.method.turn(BAD).trains
    for shard in ("none", "full"):
        first, second = (load_file(tmp_path / f"{shard}-{rank}.safetensors") for rank in range(2))
        for name in alone.optimizers:
            assert first[name].tolist() == second[name].tolist() == ([1, 0] if name in trains else [0, 0])
        for key, value in expected.items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5)
