"""Kills runs of `fewstep train` with SIGKILL at random moments, and compares their end with that of a run left alone.

    python -m benchmarks.kills [--out FILE] [--runs dmd2 consistency] [--seed 0]

A run is killed and started again by the same command until it comes to its end. Every life is a process of its own that
runs the whole command on real files; it is forked from one that has imported what the command needs, so that a kill
meets steps, lines of the log, grids of samples and saves instead of Python's imports. What is compared is every
tensor of the last checkpoint (weights, moments, averages, random streams), its counters, and the log. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.step import unet, write
from fewstep import cli
from fewstep.commands import train as command
from fewstep.training import checkpoint
from fewstep.training.retention import LATEST, list_checkpoints
from fewstep.training.tracking import Log

LEAST = 30
"""Kills that a result is worth keeping from."""
PHASES = ("start", "step", "log", "grid", "save")
RUNS: Mapping[str, Mapping[str, Any]] = {
    "dmd2": {"method": {"name": "dmd2", "critic_updates": 2, "gan_weight": 0.01}},
    "consistency": {
        "method": {"name": "consistency", "solver": "ddim", "intervals": 10},
        "data": {"workers": 2},
        "train": {"accumulate": 2},
    },
    "progressive": {"method": {"name": "progressive", "start_steps": 4}},
}
"""A discriminator and alternating players; loader processes and micro-batches; stages that hand over."""


@dataclass(frozen=True)
class Life:
    """One process of a run.

    Attributes:
        phase: what it was doing when it was killed; None: it came to its end.
        starting: seconds until it trained.
        training: seconds from there on.
        told: what it wrote to the terminal.
        left: processes of its own that outlived it by some seconds.
    """

    phase: str | None
    starting: float
    training: float
    told: str
    left: int


@dataclass(frozen=True)
class Result:
    """Of one run, killed again and again, beside the same run left alone.

    Attributes:
        method: its settings.
        workers: loader processes.
        accumulate: micro-batches a step.
        steps: of the whole run.
        kills: how often it was killed.
        during: in the middle of what, by phase.
        resumes: how often it went on from a checkpoint.
        refused: checkpoints that were found damaged.
        largest_difference: max |Δ| over every tensor of the last checkpoints.
        tensors: how many were compared.
        same_state: the counters agree: step, place in the data, updates of averages, bad steps.
        same_log: the lines of the log agree, but for the seconds in them.
        left_behind: loader processes that outlived the process they served.
        seconds: all of it took.
    """

    method: Mapping[str, Any]
    workers: int
    accumulate: int
    steps: int
    kills: int
    during: Mapping[str, int]
    resumes: int
    refused: int
    largest_difference: float
    tensors: int
    same_state: bool
    same_log: bool
    left_behind: int
    seconds: float

    @property
    def lossless(self) -> bool:
        """Whether nothing was lost."""
        return (self.largest_difference == 0 and self.same_state and self.same_log
                and self.refused == 0 and self.left_behind == 0)  # fmt: skip


def measured(name: str, folder: Path, seed: int) -> Result:
    """Kill the run `name` until it comes to its end, with files in `folder`."""
    begun, random = time.perf_counter(), Random(seed)
    values = _values(name, folder)
    alone, killed = folder / "alone", folder / "killed"
    _warm(_words(values, folder / "warm"))
    whole = _life(_words(values, alone), None)
    assert whole.phase is None
    lives: list[Life] = []
    last_step, most = 0, 4 * whole.training / values["train"]["steps"]
    while not lives or lives[-1].phase is not None:
        in_start = random.random() < 0.1
        longest = whole.starting if in_start else most
        lives.append(_life(_words(values, killed), random.uniform(0, longest), in_start))
        found = list_checkpoints(killed / command.CHECKPOINTS)
        step = int(found[-1].name.rpartition("-")[2]) if found else 0
        assert step >= last_step, "a checkpoint was lost"
        assert not found or (killed / command.CHECKPOINTS / LATEST / "state.json").is_file() or len(found) == 1
        if not in_start:  # so that about every second life comes to another checkpoint, however busy the machine is
            most *= 1 / 1.3 if step > last_step else 1.3
        last_step = step
        assert len(lives) < 10 * LEAST, "it does not come to its end"
    during = Counter(one.phase for one in lives if one.phase is not None)
    difference, tensors = largest_difference(_last(alone), _last(killed))
    return Result(
        method=values["method"], workers=values["data"].get("workers", 0),
        accumulate=values["train"].get("accumulate", 1), steps=values["train"]["steps"],
        kills=during.total(), during={phase: during[phase] for phase in PHASES},
        resumes=sum("resumed from" in one.told for one in lives),
        refused=sum(one.told.count("cannot be used") for one in lives),
        largest_difference=difference, tensors=tensors,
        same_state=_counters(_last(alone)) == _counters(_last(killed)),
        same_log=_lines(alone) == _lines(killed),
        left_behind=sum(one.left for one in lives), seconds=round(time.perf_counter() - begun, 1),
    )  # fmt: skip


def _values(name: str, folder: Path) -> dict[str, Any]:
    """The run's config, of a teacher that knows nothing."""
    torch.manual_seed(0)
    network = unet(True)
    pipeline = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler(prediction_type="v_prediction"))  # pyright: ignore[reportArgumentType]
    pipeline.save_pretrained(folder / "teacher")
    train = {"steps": 60, "ema": 0.9, "checkpoint_every": 2, "keep_every": 40, "log_every": 1, "sample_every": 20,
             "threads": 1, "trackers": []}  # fmt: skip
    values: dict[str, Any] = {
        "run": {"dir": "told on the command line"},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"name": "emoji32", "batch_size": 4},
        "optim": {"lr": 1e-3, "warmup": 10, "decay": "cosine"},
        "train": train,
        "health": {"every": 30, "samples": 8},
    }
    for section, told in RUNS[name].items():
        values[section] = {**values.get(section, {}), **told}
    (folder / "run.yaml").write_text(json.dumps(values))  # which YAML is a superset of
    return values


def _words(values: Mapping[str, Any], run: Path) -> list[str]:
    run.parent.mkdir(exist_ok=True, parents=True)
    return ["train", str(Path(values["teacher"]["path"]).parent / "run.yaml"), f"run.dir={run}"]


def _warm(words: Sequence[str]) -> None:
    """Import and compute here what every life would, so that lives are short and most of each is training."""
    with suppress(SystemExit), redirect_stdout(StringIO()):
        cli.main([*words, "train.steps=4", "data.workers=0", "health.every=4", "train.sample_every=4"])


def _life(words: Sequence[str], seconds: float | None, in_start: bool = False) -> Life:
    """A process that is killed after so many seconds of training, or of its start, if it has not ended by then."""
    context = multiprocessing.get_context("fork")
    phase = context.Value("i", PHASES.index("start"))
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "told"
        process = context.Process(target=_live, args=(words, output, phase))
        born = time.perf_counter()
        process.start()
        assert process.pid is not None
        while not in_start and phase.value == PHASES.index("start") and process.is_alive():
            time.sleep(0.001)
        begun = time.perf_counter()
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        ended, told = time.perf_counter(), output.read_text() if output.is_file() else ""
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"it failed of itself, exit code {process.exitcode}: {told}")
    at = PHASES[phase.value] if process.exitcode else None
    return Life(at, begun - born, ended - begun, told, _outlived(process.pid))


def _live(words: Sequence[str], output: Path, phase: Any) -> None:
    """The command, in a session of its own."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    AcceleratorState._reset_state(True)
    command.start = _followed(phase, command.start)
    command.sample_grid = _phased(phase, "grid", command.sample_grid)
    checkpoint.save = _phased(phase, "save", checkpoint.save)
    Log.write = _phased(phase, "log", Log.write)
    cli.main(words)


def _phased(phase: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which tells that it is being called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, phase.value = phase.value, PHASES.index(name)
        try:
            return function(*args, **kwargs)
        finally:
            phase.value = before

    return call


def _followed(phase: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, after which the steps begin."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        phase.value = PHASES.index("step")
        return out

    return call


def _outlived(session: int, seconds: float = 10.0) -> int:
    """Processes of a session whose leader has gone, once they have had the time to notice."""
    deadline = time.monotonic() + seconds
    while (left := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _members(session: int) -> int:
    count = 0
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            count += os.getsid(int(entry.name)) == session
    return count


def _last(run: Path) -> Path:
    return list_checkpoints(run / command.CHECKPOINTS)[-1]


def largest_difference(one: Path, other: Path) -> tuple[float, int]:
    """Max |Δ| over all tensors of two checkpoints, and how many there are; infinite where one lacks a tensor."""
    ours, theirs = ({(path.name, key): value for path in sorted(folder.glob("*.safetensors"))
                     for key, value in load_file(path).items()} for folder in (one, other))  # fmt: skip
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        return float("inf"), len(ours)
    largest = max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours if ours[key].numel())
    return largest, len(ours)


def _counters(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "state.json").read_text())
    return {name: facts[name] for name in ("step", "samples", "updates", "skips", "sha256")}


def _lines(run: Path) -> list[dict[str, Any]]:
    """The log, without the times in it."""
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key != "seconds" and not key.startswith("speed/")} for line in read]


def report(results: Mapping[str, Result], seed: int) -> dict[str, Any]:
    """What is written."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": "cpu",
        "precision": "fp32",
        "seed": seed,
        "runs": {name: asdict(result) for name, result in results.items()},
    }


def main() -> None:
    """Kill the runs that are asked for, print what came of it, and write it where told."""
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=["dmd2", "consistency"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    words = parser.parse_args()
    torch.set_num_threads(1)  # a fork does not inherit threads
    results: dict[str, Result] = {}
    for name in words.runs:
        with tempfile.TemporaryDirectory() as folder:
            result = results[name] = measured(name, Path(folder), words.seed)
        print(f"{name}: {result.kills} kills {dict(result.during)}, {result.resumes} resumes, "
              f"max |Δ| = {result.largest_difference:g} over {result.tensors} tensors, {result.left_behind} processes "
              f"left behind, {result.seconds:.0f} s", flush=True)  # fmt: skip
        if words.out is not None:
            write(words.out, report(results, words.seed))
    if not all(result.lossless and result.kills >= LEAST for result in results.values()):
        sys.exit("something was lost, or there were too few kills to tell")


if __name__ == "__main__":
    main()
