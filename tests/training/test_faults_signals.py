"""Signals that come at an awkward moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fewstep.commands import train as command
from fewstep.commands import watch
from fewstep.commands.train import CHECKPOINTS, logged
from fewstep.errors import RunError
from fewstep.training import best, checkpoint
from fewstep.training.checkpoint import list_checkpoints, restore_last
from fewstep.training.loop import TrainState
from fewstep.training.tracking import read_lines
from tests.training.digits import digits_run
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, assert_same, begin, config, everything, go

SECTIONS = {
    "evaluate": {"every": 1, "samples": 24, "features": "module:tests.training.digits.Blocks", "best": "fd"},
    "train": {"sample_every": 1, "checkpoint_every": 1},
    "health": {"every": 2, "samples": 8},
}
MOMENTS = {
    "evaluation": (watch.Evaluation, "__call__", 2),
    "grid": (command, "sample_grid", 2),
    "save": (checkpoint, "save", 2),
    "best": (best, "keep", 1),  # the first evaluation is the best so far
}
"""What is done, and which time it is disturbed."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def signalled(function: Callable[..., Any], at: int, numbers: tuple[signal.Signals, ...]) -> Callable[..., Any]:
    """`function`, whose call number `at` hears these signals first."""
    calls = iter(range(1, 100))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return call


def finish(state: TrainState) -> TrainState:
    for _ in logged(state):
        pass
    return state


def left(run: Path) -> list[Any]:
    """All that a run leaves besides its checkpoints: pictures, figures, which was the best."""
    lines = read_lines(run / "log.jsonl")
    told = [{k: v for k, v in line.items() if k != "seconds" and k[:6] != "speed/"} for line in lines]
    pictures = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("*/*.png"))}
    return [told, pictures, (run / "best").readlink()]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_something_else_is_done_loses_nothing(tmp_path, monkeypatch, moment):
    """The step's evaluation, grid and best checkpoint are there once, and none is made again or left out."""
    straight = finish(digits_run(tmp_path / "straight", **SECTIONS))
    place, name, at = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalled(getattr(place, name), at, (signal.SIGTERM,)))
        with pytest.raises(RunError, match=r"stopped by SIGTERM: saved at step \d; the same command goes on") as caught:
            finish(digits_run(tmp_path / "cut", **SECTIONS))
    again = digits_run(tmp_path / "cut", **SECTIONS)
    assert f"saved at step {again.step};" in str(caught.value)
    assert 2 <= again.step < 4
    finish(again)
    assert_same(everything(straight), everything(again))
    assert left(tmp_path / "cut" / "run") == left(tmp_path / "straight" / "run")


def test_a_grid_that_is_due_when_the_signal_is_heard_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "sample_grid", signalled(command.sample_grid, 2, (signal.SIGTERM,)))
    with pytest.raises(RunError, match=r"stopped by SIGTERM: saved at step 2;"):
        finish(digits_run(tmp_path, train={"sample_every": 1}))
    made = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert made == ["step-00000001.png", "step-00000002.png"]


def saves_and_hears(folder: Path, numbers: tuple[signal.Signals, ...]) -> None:
    """A run that hears signals in the middle of its second save."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs deaf to it
    checkpoint._finish = signalled(checkpoint._finish, 2, numbers)
    run = config(METHODS["dmd2"], folder, train={"checkpoint_every": 2, "trackers": []})
    finish(begin(run))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_save_and_leaves_the_checkpoint_before(tmp_path, number):
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=partial(saves_and_hears, tmp_path, (number, number)))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGTERM if number == signal.SIGTERM else 1)
    run = config(METHODS["dmd2"], tmp_path)
    again, straight = begin(run), begin(run)
    assert [path.name for path in list_checkpoints(tmp_path / CHECKPOINTS)] == ["step-00000002"]
    assert restore_last(tmp_path / CHECKPOINTS, again, lambda text: None) is not None
    go(again)
    go(straight)
    assert_same(everything(straight), everything(again))


def one_hears(folder: Path) -> None:
    """Two processes, of which the second is told to stop in its first step."""
    train = {"steps": 8, "log_every": 3, "checkpoint_every": 100, "trackers": []}
    rank = dist.get_rank()
    try:
        for report in logged(begin_rank(config(METHODS["dmd2"], folder / "run", train=train))):
            if rank == 1 and report.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    except RunError as error:
        (folder / f"told-{rank}").write_text(str(error))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    assert launch(one_hears, tmp_path, seconds=60) == [0, 0]
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == "stopped: saved at step 3; the same command goes on from there"
    assert told[1] == "stopped by SIGTERM: saved at step 3; the same command goes on from there"
    run = config(METHODS["dmd2"], tmp_path / "run", train={"steps": 8})
    again, straight = begin(run), begin(run)
    assert restore_last(tmp_path / "run" / CHECKPOINTS, again, lambda text: None) is not None
    assert again.step == 3
    go(again)
    go(straight)
    for key, value in everything(straight).items():
        torch.testing.assert_close(everything(again)[key], value, rtol=0, atol=1e-5)
