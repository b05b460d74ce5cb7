"""Killed with SIGKILL at any moment, again and again, and started again: the end is that of a run nobody touched."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from fewstep.commands.train import CHECKPOINTS, logged
from fewstep.config import RunConfig
from fewstep.training import checkpoint
from fewstep.training.retention import list_checkpoints
from fewstep.training.tracking import Log
from tests.training.runs import METHODS, begin, config, everything

KILLS = 40
PHASES = ("start", "step", "log", "save")


@dataclass(frozen=True)
class Life:
    """One process of a run.

    Attributes:
        phase: what it was doing when it was killed; None: it came to its end.
        resumed_at: the step it began at.
        seconds: how long it trained.
    """

    phase: str | None
    resumed_at: int
    seconds: float


def phased(phase: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which tells that it is being called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, phase.value = phase.value, PHASES.index(name)
        try:
            return function(*args, **kwargs)
        finally:
            phase.value = before

    return call


def live(run: RunConfig, phase: Any, began: Any) -> None:
    """What `fewstep train` does from its last checkpoint on."""
    torch.set_num_threads(1)
    checkpoint.save = phased(phase, "save", checkpoint.save)
    Log.write = phased(phase, "log", Log.write)
    state = begin(run)
    checkpoint.restore_last(run.run.dir / CHECKPOINTS, state, lambda text: os._exit(3))
    began.value = state.step
    phase.value = PHASES.index("step")
    for _ in logged(state):
        pass


def life(run: RunConfig, seconds: float, in_its_start: bool = False) -> Life:
    """A process that is killed after so many seconds of training, or of its start, if it has not ended by then."""
    context = torch.multiprocessing.get_context("fork")
    phase, began = context.Value("i", 0), context.Value("i", 0)
    process = context.Process(target=live, args=(run, phase, began))
    process.start()
    while not in_its_start and phase.value == PHASES.index("start") and process.is_alive():
        time.sleep(0.001)
    begun = time.perf_counter()
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "it failed of itself"
    return Life(PHASES[phase.value] if process.exitcode else None, began.value, time.perf_counter() - begun)


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("speed/")} for line in read]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["dmd2_gan", "progressive"])
def test_killed_at_random_points_ends_at_the_same_bits(tmp_path, name):
    def run(folder: str) -> RunConfig:
        train = {"steps": 120, "checkpoint_every": 2, "log_every": 1, "keep_every": 40, "trackers": []}
        return config(METHODS[name], tmp_path / folder, train=train, health={"every": 0})

    begun = time.perf_counter()
    for _ in logged(begin(config(METHODS[name], tmp_path / "warm", train={"trackers": []}))):
        pass  # what is imported and filled at the first use is then there in every fork
    straight = life(run("straight"), 300)
    assert straight.phase is None
    random, lives, last_step = Random(0), [], 0
    while not lives or lives[-1].phase is not None:
        # A life comes two or three checkpoints further on average.
        seconds = random.uniform(0.0, 2 * straight.seconds / KILLS)
        lives.append(life(run("killed"), seconds, in_its_start=random.random() < 0.1))
        found = list_checkpoints(tmp_path / "killed" / CHECKPOINTS)
        step = int(found[-1].name[-8:]) if found else 0
        assert step >= last_step, "a checkpoint was lost"
        last_step = step
        assert len(lives) < 5 * KILLS
    kills = Counter(one.phase for one in lives if one.phase is not None)
    resumes = sum(one.resumed_at > 0 for one in lives)
    ends = []
    for folder in ("straight", "killed"):
        state = begin(run(folder))
        checkpoint.restore(list_checkpoints(tmp_path / folder / CHECKPOINTS)[-1], state)
        ends.append(everything(state))
    assert ends[0].keys() == ends[1].keys()
    difference = max(float((ends[0][key].double() - ends[1][key].double()).abs().max()) for key in ends[0])
    print(f"{name}: {kills.total()} kills ({dict(kills)}), {resumes} resumes, max |difference| = {difference}, "
          f"{time.perf_counter() - begun:.0f} s")  # fmt: skip
    assert difference == 0
    assert kills.total() >= 30
    assert min(kills[phase] for phase in ("step", "save")) > 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert list((tmp_path / "killed" / CHECKPOINTS).glob(".partial*")) == []
