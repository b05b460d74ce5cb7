"""Data that goes while a run reads it: the run ends in one clear line, and the next one goes on as if nothing was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.commands.train import CHECKPOINTS, logged
from fewstep.commands.train import start as begin_or_resume
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.data.faults import DataFault
from fewstep.data.loader import Loader
from fewstep.data.samples import Samples
from fewstep.errors import RunError, UserError
from fewstep.training.checkpoint import list_checkpoints, restore_last
from fewstep.training.loop import TrainState, train
from fewstep.training.opening import Sources, open_sources
from tests.training.runs import METHODS, assert_same, begin, config, everything, go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as Linux has them")


_OTHERS: set[int] = set()


def everybody() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def children() -> list[int]:
    return [pid for pid in everybody() if pid not in _OTHERS]


@pytest.fixture(autouse=True)
def others() -> None:
    """What earlier tests have left running is none of these tests' workers."""
    _OTHERS.clear()
    _OTHERS.update(everybody())


def kill_workers() -> None:
    for pid in children():
        os.kill(pid, signal.SIGKILL)


class Wide:
    """Samples whose batch is larger than a pipe holds, so that a worker is always in the middle of a message."""

    shape, classes, length = (1 << 20,), (), None

    def batch(self, indices: Sequence[int]) -> Samples:
        return Samples(torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 1 << 20).contiguous())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_killed_in_the_middle_of_a_message_is_reported_at_once(number, workers):
    batches = iter(Loader(Wide(), 2, seed=0, workers=workers))
    next(batches)
    time.sleep(0.2)  # until every worker has filled its pipe
    os.kill(children()[-1], number)
    begun = time.monotonic()
    with pytest.raises(DataFault, match=rf"a data loader worker died \(killed by {number.name}.*lower data\.workers"):
        list(islice(batches, 2 * workers + 2))
    assert time.monotonic() - begun < 30
    assert children() == []


def test_workers_outlive_the_signals_that_stop_a_run():
    """A terminal and a scheduler send them to every process of a run, which needs data until it has saved."""
    batches = iter(Loader(Wide(), 1, seed=0, workers=2))
    next(batches)
    for pid in children():
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [int(batch.index) for batch in islice(batches, 6)] == [1, 2, 3, 4, 5, 6]
    del batches
    assert children() == []


class Broken:
    """A data set with a mistake of its programmer's."""

    shape, classes, length = (1,), (), None

    def batch(self, indices: Sequence[int]) -> Samples:
        return {}[indices[0]]


def test_a_programmers_mistake_arrives_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in batch.*KeyError: 0"):
        next(iter(Loader(Broken(), 1, seed=0, workers=1)))


def fault_at(state: TrainState, step: int, fault: Callable[[], None]) -> str:
    """Train, cause the fault after that step, and give back what the run said at its end."""
    reports = logged(state)
    for report in islice(reports, step):
        assert report.step <= step
    fault()
    with pytest.raises(RunError) as caught:
        list(reports)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def goes_on_as_if_nothing_had_been(run: RunConfig, sources: Callable[[], Sources | None], straight: TrainState) -> None:
    again = begin(run, sources())
    assert restore_last(run.run.dir / CHECKPOINTS, again, lambda text: None) is not None
    for _ in train(again):
        pass
    assert_same(everything(straight), everything(again))


@pytest.mark.parametrize("method", ["dmd2", "consistency"])
def test_a_run_whose_worker_is_killed_names_its_checkpoint_and_loses_nothing(tmp_path, method):
    steps = 12  # more than the three and the four that workers may have ready
    run = config(METHODS[method], tmp_path, data={"workers": 2}, train={"checkpoint_every": 2, "steps": steps})
    told = fault_at(begin(run), 3, kill_workers)
    assert told.startswith("a data loader worker died (killed by SIGKILL; out of memory?)")
    assert told.endswith(f"; the same command goes on from {last(tmp_path)}")
    straight = begin(config(METHODS[method], tmp_path / "straight", train={"steps": steps}))
    go(straight)
    goes_on_as_if_nothing_had_been(run, lambda: None, straight)


def test_a_fault_before_the_first_checkpoint_says_so(tmp_path):
    run = config(METHODS["dmd2"], tmp_path, data={"workers": 1}, train={"checkpoint_every": 100})
    told = fault_at(begin(run), 2, kill_workers)
    assert told.endswith("; there is no checkpoint yet")


def last(folder: Path) -> str:
    """The checkpoint that is there: workers had made some batches more before they died."""
    return list_checkpoints(folder / CHECKPOINTS)[-1].name


def moved(source: Path, target: Path) -> None:
    source.rename(target)


def pretraining(folder: Path, data: dict[str, object]) -> RunConfig:
    """A small network from scratch on pictures of 8 pixels."""
    network = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
               "layers_per_block": 1, "norm_num_groups": 4}  # fmt: skip
    return parse({
        "run": {"dir": str(folder / "run")},
        "student": {"new": {"config": network}},
        "method": {"name": "pretrain"},
        "data": {"size": 8, "batch_size": 2, **data},
        "train": {"steps": 6, "checkpoint_every": 2, "sample_every": 0, "log_every": 1},
    })  # fmt: skip


def pictures(folder: Path) -> None:
    """Three, so that a run of two at a time begins a new epoch every other step."""
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("red")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_vanishes_in_mid_run(tmp_path, workers):
    pictures(tmp_path / "set")
    run = pretraining(tmp_path, {"name": "captions", "path": str(tmp_path / "set"), "workers": workers})
    straight = begin(run, open_sources(run))
    go(straight)
    told = fault_at(begin(run, open_sources(run)), 2, lambda: moved(tmp_path / "set", tmp_path / "away"))
    assert "png' cannot be read any more (No such file or directory); put it back; the same command goes on" in told
    assert told.endswith(f"from {last(tmp_path / 'run')}")
    (tmp_path / "away").rename(tmp_path / "set")
    goes_on_as_if_nothing_had_been(run, lambda: open_sources(run), straight)


def test_a_folder_that_vanishes_between_a_crash_and_the_next_start(tmp_path, capsys):
    """Told before the first step; and once it is back, the run goes on over the end of an epoch to the same bits."""
    pictures(tmp_path / "set")
    run = pretraining(tmp_path, {"name": "captions", "path": str(tmp_path / "set")})
    straight = begin(run, open_sources(run))
    go(straight)
    for report in logged(begin(run, open_sources(run))):
        if report.step == 5:
            break
    moved(tmp_path / "set", tmp_path / "away")
    with pytest.raises(UserError, match=r"^data.path: no (file or )?folder .*set'"):
        begin_or_resume(run)
    moved(tmp_path / "away", tmp_path / "set")
    again = begin_or_resume(run)
    assert again.step == 4
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"/{last(tmp_path / 'run')}")
    go(again)
    assert_same(everything(straight), everything(again))
