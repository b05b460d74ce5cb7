"""What may happen to a run's folder while it trains, and between two starts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fewstep.commands.train import CHECKPOINTS, logged
from fewstep.errors import RunError
from fewstep.training.checkpoint import list_checkpoints, restore_last
from fewstep.training.loop import TrainState
from tests.training.digits import digits_run
from tests.training.disks import fill, mount
from tests.training.runs import METHODS, assert_same, begin, config, everything, go
from tests.training.test_faults import train_and


def quiet(folder: Path, **train: object) -> TrainState:
    return begin(config(METHODS["pretrain"], folder, train={"steps": 4, "trackers": [], **train}))


def test_a_grid_of_samples_that_finds_no_room_is_one_line(disk):
    mount(disk, "-o", "remount,size=16m")
    state = digits_run(disk, train={"sample_every": 1, "checkpoint_every": 2})
    with pytest.raises(RunError, match=r"run: cannot be written \(No space left on device\); .* from step-00000002"):
        train_and(state, 2, lambda: fill(disk, 0))
    samples = sorted(path.name for path in (disk / "run" / "samples").iterdir())
    assert samples == ["step-00000001.png", "step-00000002.png"], "nothing is left of the third"


def test_a_tracker_that_finds_no_room_ends_in_one_line_too(disk):
    """TensorBoard keeps its events in a thread of its own, which fails later than the log."""
    mount(disk, "-o", "remount,size=2m")
    state = quiet(disk / "run", trackers=["tensorboard"], log_every=1, checkpoint_every=2)
    with pytest.raises(RunError, match=r"cannot be written \(.*No space left on device.*\); .* from step-00000002"):
        train_and(state, 2, lambda: fill(disk, 0))


def test_checkpoints_that_somebody_removes_are_not_missed(tmp_path):
    state = quiet(tmp_path / "run", checkpoint_every=1)
    train_and(state, 2, lambda: shutil.rmtree(tmp_path / "run" / CHECKPOINTS))
    folder = tmp_path / "run" / CHECKPOINTS
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    assert (folder / "latest").readlink() == Path("step-00000004")


def test_a_folder_that_somebody_removes_ends_the_run_in_one_line(tmp_path):
    state = quiet(tmp_path / "run", log_every=1)
    told = r"run/log.jsonl: cannot be written \(No such file or directory\); there is no checkpoint yet"
    with pytest.raises(RunError, match=told):
        train_and(state, 2, lambda: shutil.rmtree(tmp_path / "run"))


def nowhere(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step-00000099", target_is_directory=True)


def missing(folder: Path) -> None:
    (folder / "latest").unlink()


def copied(folder: Path) -> None:
    """As a copy that follows links leaves it."""
    (folder / "latest").unlink()
    shutil.copytree(list_checkpoints(folder)[0], folder / "latest")


@pytest.mark.parametrize("change", [nowhere, missing, copied])
def test_no_run_reads_its_link(tmp_path, change: Callable[[Path], None]):
    """It goes on from the last checkpoint wherever `latest` leads."""
    folder = tmp_path / "run" / CHECKPOINTS
    train_and(quiet(tmp_path / "run", checkpoint_every=1), 4, lambda: change(folder))
    again = quiet(tmp_path / "run", steps=5, checkpoint_every=1)
    assert restore_last(folder, again, lambda text: None) == folder / "step-00000004"
    for _ in logged(again):
        pass
    assert (folder / "latest").is_symlink() != (change is copied)
    assert (folder / "latest" / "state.json").is_file()
    assert list(folder.glob(".partial*")) == []


def test_the_link_leaves_a_damaged_checkpoint_at_the_next_start(tmp_path, capsys):
    for _ in logged(digits_run(tmp_path, train={"checkpoint_every": 2})):
        pass
    folder = tmp_path / "run" / CHECKPOINTS
    assert (folder / "latest").readlink() == Path("step-00000004")
    (folder / "step-00000004" / "player-student.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    state = digits_run(tmp_path, train={"checkpoint_every": 2})
    assert state.step == 2
    assert (folder / "latest").readlink() == Path("step-00000002")
    warning, resumed = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ")
    assert warning.endswith("step-00000004 cannot be used; going back to the one before")
    assert resumed == f"resumed from {folder / 'step-00000002'}"


@pytest.fixture
def clock_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("clock_runs_backwards")
def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    """The newest checkpoint is the one of the most steps, whenever its files say that they were made."""
    run = tmp_path / "run"
    train_and(quiet(run, steps=6, log_every=1, checkpoint_every=2, keep_last=3), 4, lambda: None)
    for age, found in enumerate(reversed(list_checkpoints(run / CHECKPOINTS))):
        os.utime(found, (1e9 * age, 1e9 * age))
    again, straight = (quiet(folder, steps=8, log_every=1) for folder in (run, tmp_path / "straight"))
    assert restore_last(run / CHECKPOINTS, again, lambda text: None) == run / CHECKPOINTS / "step-00000006"
    for _ in logged(again):
        pass
    go(straight)
    assert_same(everything(straight), everything(again))
