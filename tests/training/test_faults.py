"""What goes wrong in a run, and what is left of it."""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fewstep.commands.train import CHECKPOINTS, logged, save
from fewstep.config import Optim
from fewstep.errors import RunError, UserError
from fewstep.models.players import Player
from fewstep.training import checkpoint, tensor_files
from fewstep.training.checkpoint import Damaged, list_checkpoints, restore_last
from fewstep.training.loop import TrainState, train
from fewstep.training.optim import make_optimizers
from tests.training.disks import fill, mount
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, assert_same, begin, config, everything, go


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_moves_nothing(bad, clip):
    """A run with a bad step in its middle is the run without that step, to the bit."""

    def weights(gradients: list[float]) -> torch.Tensor:
        player = Player({"w": nn.Parameter(torch.zeros(2))})
        optimizer = make_optimizers({"a": player}, Optim(lr=0.1, clip=clip))["a"]
        for value in gradients:
            player.parameters["w"].grad = torch.tensor([value, 1.0])
            optimizer.step(1.0, clip)
        return player.parameters["w"].detach()

    assert torch.equal(weights([0.5, bad, 2.0]), weights([0.5, 2.0]))
    assert not torch.equal(weights([0.5, 2.0]), weights([0.5]))


def test_bad_steps_are_counted_and_forgiven():
    player = Player({"w": nn.Parameter(torch.zeros(1))})
    optimizer = make_optimizers({"a": player}, Optim())["a"]
    streaks = []
    for value in (float("nan"), float("nan"), 1.0, float("inf")):
        player.parameters["w"].grad = torch.tensor([value])
        optimizer.step(1.0, None)
        streaks.append(float(optimizer.skips.streak))
    assert streaks == [1, 2, 0, 1]
    assert float(optimizer.skips.total) == 3


def test_a_run_that_stays_bad_stops_and_says_who(tmp_path):
    run = config(METHODS["pretrain"], tmp_path, train={"steps": 50, "log_every": 5, "max_bad_steps": 8})
    state = begin(run)
    with torch.no_grad():
        next(iter(state.method.players["student"].parameters.values())).fill_(float("nan"))
    with pytest.raises(RunError, match=r"gradient of student has not been finite for 10 of its steps, up to step 10"):
        for _ in logged(state):
            pass


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run = config(METHODS["dmd2"], tmp_path, train={"checkpoint_every": 2, "keep_last": 3})
    for _ in logged(begin(run)):
        pass
    straight = begin(run)
    go(straight)
    folder = tmp_path / CHECKPOINTS
    newest = list_checkpoints(folder)[-1]
    (newest / "player-student.safetensors").write_bytes(b"torn")
    told: list[str] = []
    state = begin(run)
    resumed = restore_last(folder, state, told.append)
    assert resumed is not None
    assert (resumed.name, state.step) == ("step-00000006", 6)
    assert len(told) == 1
    assert f"{newest.name} cannot be used; going back to the one before" in told[0]
    go(state)
    assert_same(everything(straight), everything(state))


def test_all_damaged_is_the_end(tmp_path):
    run = config(METHODS["pretrain"], tmp_path, train={"steps": 2, "checkpoint_every": 1})
    for _ in logged(begin(run)):
        pass
    for found in list_checkpoints(tmp_path / CHECKPOINTS):
        (found / "rng.safetensors").unlink()
    state = begin(run)
    before = everything(state)
    with pytest.raises(Damaged, match=r"no other is whole; remove .* to start the run anew"):
        restore_last(tmp_path / CHECKPOINTS, state, lambda text: None)
    assert_same(before, everything(state))


def signalled(state: TrainState, which: signal.Signals) -> None:
    """Train, and signal this process after step 2."""
    for report in logged(state):
        if report.step == 2:
            os.kill(os.getpid(), which)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, which):
    run = config(METHODS["dmd2"], tmp_path / "cut", train={"checkpoint_every": 100, "log_every": 100})
    before = signal.getsignal(which)
    state = begin(run)
    with pytest.raises(RunError, match=rf"stopped by {which.name}: saved at step 3; the same command goes on"):
        signalled(state, which)
    assert signal.getsignal(which) is before
    again = begin(run)
    checkpoint.restore(list_checkpoints(tmp_path / "cut" / CHECKPOINTS)[-1], again)
    assert again.step == 3
    for _ in train(again):
        pass
    straight = begin(config(METHODS["dmd2"], tmp_path / "straight"))
    go(straight)
    assert_same(everything(straight), everything(again))


def test_a_refused_write_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = config(METHODS["pretrain"], tmp_path, train={"steps": 4, "checkpoint_every": 2})
    state = begin(run)
    go(state, 2)
    save(state)
    good = list_checkpoints(tmp_path / CHECKPOINTS)

    def full(tensors: object, path: object, metadata: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tensor_files, "save_file", full)
    go(state, 1)
    with pytest.raises(
        RunError, match=r"step-00000003 cannot be written \(No space left on device\); the same command"
    ):
        save(state)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path / CHECKPOINTS) == good
    resumed = begin(run)
    assert restore_last(tmp_path / CHECKPOINTS, resumed, lambda text: None) == good[0]
    assert json.loads((good[0] / "state.json").read_text())["step"] == 2


QUIET = {"checkpoint_every": 1, "log_every": 100, "trackers": []}


def train_and(state: TrainState, step: int, do: Callable[[], object]) -> None:
    for report in logged(state):
        if report.step == step:
            do()


@pytest.mark.parametrize("room", [0, 4096, 16384])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, disk, room):
    """Wherever in the save the room ends: at its first file, its second, or a later one."""
    run = config(METHODS["pretrain"], disk / "run", train={"steps": 4, **QUIET})
    told = (
        r"checkpoints: step-00000003 cannot be written \(.*No space left on device.*\); .* goes on from step-00000002"
    )
    with pytest.raises(RunError, match=told):
        train_and(begin(run), 2, lambda: fill(disk, room))
    folder = disk / "run" / CHECKPOINTS
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000001", "step-00000002"]
    assert (folder / "latest" / "state.json").is_file()
    assert list(folder.glob(".partial*")) == [], "what was half written gives its room back"
    (disk / "filler").unlink()
    again, straight = begin(run), begin(config(METHODS["pretrain"], tmp_path, train={"steps": 4}))
    assert restore_last(folder, again, lambda text: None) == folder / "step-00000002"
    for _ in logged(again):
        pass
    go(straight)
    assert_same(everything(straight), everything(again))


def test_a_log_that_cannot_be_written_is_one_line(disk):
    run = config(METHODS["pretrain"], disk / "run", train={"steps": 4, **QUIET, "log_every": 1})
    log = disk / "run" / "log.jsonl"

    def fill_up() -> None:
        with log.open("a") as stream:  # up to the end of a page, or the next line would still have room
            stream.write("\n" * (-log.stat().st_size % mmap.PAGESIZE))
        fill(disk, 0)

    with pytest.raises(RunError, match=r"run: cannot be written \(No space left on device\); .* from step-00000002"):
        train_and(begin(run), 2, fill_up)


def test_a_folder_that_cannot_be_written_is_told_before_training(disk):
    mount(disk, "-o", "remount,ro")
    run = config(METHODS["pretrain"], disk / "run", train={"steps": 4, **QUIET})
    with pytest.raises(UserError, match=r"run.dir: .*/run cannot be written: Read-only file system"):
        next(logged(begin(run)))


def test_a_disk_that_becomes_read_only_leaves_the_last_good_checkpoint(disk):
    run = config(METHODS["pretrain"], disk / "run", train={"steps": 4, **QUIET})
    with pytest.raises(RunError, match=r"step-00000003 cannot be written \(Read-only file system\); .* step-00000002"):
        train_and(begin(run), 2, lambda: mount(disk, "-o", "remount,ro"))
    state = begin(run)
    assert restore_last(disk / "run" / CHECKPOINTS, state, lambda text: None) is not None
    assert state.step == 2


def lose_rank(folder: Path, shard: str) -> None:
    """The second process is killed in its fifth step; the first one writes down how it ends."""
    sections = {"checkpoint_every": 2, "shard": shard, "trackers": []}
    state = begin_rank(config(METHODS["dmd2"], folder / "run", train={"steps": 8, **sections}))
    if dist.get_rank() == 1:
        for report in logged(state):
            if report.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        for _ in logged(state):
            pass
    except RunError as error:
        (folder / "told.json").write_text(json.dumps({"told": str(error), "seconds": time.monotonic() - begun}))
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_killed_rank_ends_the_others_and_loses_nothing(tmp_path, shard):
    assert launch(partial(lose_rank, shard=shard), tmp_path, seconds=60) == [1, -signal.SIGKILL]
    end = json.loads((tmp_path / "told.json").read_text())
    assert end["told"] == "another process of this run has gone; the same command goes on from step-00000004"
    assert end["seconds"] < 30
    run = config(METHODS["dmd2"], tmp_path / "run", train={"steps": 8})
    again, straight = begin(run), begin(run)
    assert restore_last(tmp_path / "run" / CHECKPOINTS, again, lambda text: None) is not None
    assert again.step == 4
    go(again)
    go(straight)
    for key, value in everything(straight).items():
        torch.testing.assert_close(everything(again)[key], value, rtol=0, atol=1e-5)
