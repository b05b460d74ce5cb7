"""The log and the trackers beside it: the same numbers, each step once, and no tracker that is not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fewstep.commands.train import logged
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.errors import UserError
from fewstep.training import checkpoint, clock
from fewstep.training.clock import Clock, Speed, peak_memory
from fewstep.training.loop import TrainState
from fewstep.training.tracking import open_trackers, read_lines
from tests.training.runs import METHODS, begin, config


class Recorder(ModuleType):
    """wandb and trackio as far as they are used: what they were told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.starts: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Recorder:
        self.starts.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def online(request, monkeypatch) -> Recorder:
    recorder = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, recorder)
    return recorder


def seven_steps(folder: Path, *trackers: str) -> RunConfig:
    train = {"steps": 7, "checkpoint_every": 3, "log_every": 1, "trackers": list(trackers)}
    return config(METHODS["dmd2"], folder, train=train, health={"every": 0})


def finish(state: TrainState) -> None:
    for _ in logged(state):
        pass


def cut_at_five(run: RunConfig) -> TrainState:
    """The run as it is resumed from step 3, after it was killed at step 5."""
    for report in logged(begin(run)):
        if report.step == 5:
            break
    state = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(run.run.dir / "checkpoints")[-1], state)
    assert state.step == 3
    return state


def test_a_tracker_is_told_every_number_of_the_log(tmp_path, online):
    run = seven_steps(tmp_path / "mine", online.__name__)
    finish(begin(run))
    lines = read_lines(tmp_path / "mine" / "log.jsonl")
    assert len(lines) == 7
    expected = [(line["step"], {k: v for k, v in line.items() if isinstance(v, float)}) for line in lines]
    assert online.lines == expected
    assert {"critic/denoising", "gradient_norm/fake_score", "speed/network_share"} <= set(online.lines[0][1])
    assert online.finished == 1
    (start,) = online.starts
    assert (start["project"], start["name"], start["resume"]) == ("fewstep", "mine", "never")
    assert parse(start["config"]) == run


def test_a_resumed_run_tells_no_step_twice(tmp_path, online):
    run = seven_steps(tmp_path, online.__name__)
    finish(cut_at_five(run))
    assert [step for step, _ in online.lines] == [1, 2, 3, 4, 5, 6, 7]
    first, second = online.starts
    assert second["resume"] == "allow"
    assert first.get("id") == second.get("id")
    assert ("id" in first) == (online.__name__ == "wandb")


def test_a_run_from_its_start_is_a_new_one(tmp_path, online):
    run = seven_steps(tmp_path, online.__name__)
    for _ in range(2):
        finish(begin(run))
    assert [step for step, _ in online.lines] == [1, 2, 3, 4, 5, 6, 7] * 2
    assert [start["resume"] for start in online.starts] == ["never", "never"]
    if online.__name__ == "wandb":
        assert online.starts[0]["id"] != online.starts[1]["id"]


def test_the_project_may_be_named_outside(tmp_path, online, monkeypatch):
    monkeypatch.setenv(f"{online.__name__.upper()}_PROJECT", "ours")
    finish(begin(seven_steps(tmp_path, online.__name__)))
    assert online.starts[0]["project"] == "ours"


def test_a_tracker_that_is_not_there_is_a_mistake(tmp_path, monkeypatch):
    """Before anything is built; and None never asks for more than there is."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in BOARDS else find(name))
    line = (
        "train.trackers: wandb is not installed; pip install 'fewstep[track]', or leave it out (log.jsonl is written "
        "in any case)"
    )
    with pytest.raises(UserError) as error:
        open_trackers(seven_steps(tmp_path, "wandb"), 0, 0)
    assert str(error.value) == line
    run = config(METHODS["dmd2"], tmp_path, train={"trackers": None})
    assert open_trackers(run, 0, 0) == []


BOARDS = ("wandb", "trackio", "tensorboard")


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (["tensorbord"], ("train.trackers.0: must be 'tensorboard', 'trackio' or 'wandb'", "mean 'tensorboard'")),
        ("wandb", ("train.trackers: ", "a list is needed", "found 'wandb'")),
    ],
)
def test_a_tracker_nobody_knows_is_one_line(tmp_path, given, fragments):
    with pytest.raises(UserError) as error:
        config(METHODS["dmd2"], tmp_path, train={"trackers": given})
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


def test_tensorboard_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="the track extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = seven_steps(tmp_path, "tensorboard")
    finish(cut_at_five(run))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    told = {one.step: one.value for one in board.Scalars("gradient_norm/fake_score")}
    lines = {line["step"]: line for line in read_lines(tmp_path / "log.jsonl")}
    assert len(board.Scalars("gradient_norm/fake_score")) == len(told)
    assert told == {
        step: pytest.approx(line["gradient_norm/fake_score"])
        for step, line in lines.items()
        if "gradient_norm/fake_score" in line
    }
    assert len(told) == 5


def test_no_tracker_leaves_the_file_alone(tmp_path):
    finish(begin(seven_steps(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json", "log.jsonl"]


def test_a_line_that_a_kill_tore_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 0.5}\n{"step": 2, "sec')
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1, "seconds": 0.5}]


def test_figures_stand_in_the_line_of_their_step(tmp_path):
    """In between two lines of `train.log_every` too: a reading has a line of its own."""
    train = {"steps": 7, "log_every": 5, "trackers": []}
    run = config(METHODS["dmd2"], tmp_path, train=train, health={"every": 3, "samples": 8})
    finish(begin(run))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 7]
    assert ["health/gap" in line for line in lines] == [True, False, True, True]


def ticking(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    times = iter(seconds)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))


def test_the_clock_sums_up_what_lies_between_its_marks(monkeypatch):
    ticking(monkeypatch, 1.0, 1.5, 4.0, 6.0)
    watch = Clock(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        watch.stop()
    assert watch.read() == 2.5
    assert watch.read() == 0


def test_a_clock_that_is_off_asks_nobody(monkeypatch):
    ticking(monkeypatch)
    watch = Clock()
    watch.start()
    watch.stop()
    assert watch.read() == 0


def test_speed_is_of_the_steps_since_the_last_line(monkeypatch):
    ticking(monkeypatch, 0.0, 1.0, 3.0, 4.0, 8.0)  # made; start, stop; read; read
    watch = Clock(torch.device("cpu"))
    speed = Speed(watch, torch.device("cpu"), step=10, batch_size=6)
    watch.start()
    watch.stop()
    figures = speed.read(12)
    assert (figures["speed/images_per_second"], figures["speed/network_share"]) == (3.0, 0.5)
    assert speed.read(20)["speed/images_per_second"] == 12.0


def test_the_peak_of_memory_is_in_mebibytes():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("this system tells the memory of a process elsewhere")
    now = next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    assert now - 1 <= peak < 100 * now


@pytest.mark.gpu
def test_the_clock_of_a_gpu_reads_its_own_events():
    device = torch.device("cuda")
    watch, x = Clock(device), torch.randn(4096, 4096, device=device)
    watch.start()
    for _ in range(50):
        x = (x @ x).clamp(-1, 1)
    watch.stop()
    assert 1e-3 < watch.read() < 10
    assert watch.read() == 0
