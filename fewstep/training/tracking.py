"""The run's log: JSON lines always, and whatever tracker the run asks for beside them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.training.loop import Report

FILE = "log.jsonl"


class Tracker(Protocol):
    """Where numbers go besides the file."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one line."""
        ...

    def close(self) -> None:
        """Hand over what is still held."""
        ...


class Log:
    """`log.jsonl` of a run, cut back to `step` on opening, so that a resumed run logs each step once."""

    def __init__(self, config: RunConfig, step: int) -> None:
        folder = config.run.dir
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        told = max((line["step"] for line in read_lines(self._path)), default=0)
        self._started = time.perf_counter() - _cut_back(self._path, step)
        self._trackers = open_trackers(config, step, told)

    def close(self) -> None:
        """Hand what the trackers still hold to the disk or the network."""
        for tracker in self._trackers:
            tracker.close()

    def write(self, report: Report, images: int, figures: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Log a report and return the line; this waits for the device.

        Args:
            report: the step's.
            images: seen since the run began.
            figures: whatever else is known of this step, as plain values.
        """
        line: dict[str, Any] = {"step": report.step, "turn": report.turn, **_on_the_host(report), **(figures or {})}
        line |= {"seconds": round(time.perf_counter() - self._started, 3), "images": images}
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if isinstance(value, float)}
        for tracker in self._trackers:
            tracker.log(numbers, report.step)
        return line


def _on_the_host(report: Report) -> dict[str, float]:
    """The losses, figures and gradient norms of a report, in one transfer."""
    named = {f"{report.turn}/{name}": value for name, value in
             {**report.terms.losses, **report.terms.figures}.items()}  # fmt: skip
    named |= {f"gradient_norm/{player}": norm for player, norm in report.gradient_norms.items()}
    values = torch.stack([value.double() for value in named.values()]).tolist() if named else []
    return dict(zip(named, values, strict=True))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, in order; none where there is no log."""
    if not path.is_file():
        return []
    return [line for line in map(_read, path.read_text().splitlines()) if line is not None]


def _cut_back(path: Path, step: int) -> float:
    """Drop the lines after `step`; the seconds of training that the last one left tells of."""
    if not path.is_file():
        return 0.0
    kept = [line for line in read_lines(path) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)
    return kept[-1]["seconds"] if kept else 0.0


def _read(line: str) -> dict[str, Any] | None:
    """A line's content; None for one that a killed run left torn."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def require_trackers(names: Iterable[str] | None) -> None:
    """Does nothing where all that are asked for are installed.

    Raises:
        UserError: one is not.
    """
    for name in names or ():
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name} is not installed; pip install 'fewstep[track]', or leave it out "
                f"({FILE} is written in any case)"
            )


def open_trackers(config: RunConfig, step: int, told: int) -> list[Tracker]:
    """The trackers of a run.

    Args:
        config: whose `train.trackers` names them.
        step: at which the run goes on.
        told: the last step that an earlier start of it has logged. Steps up to there are being done again, to the same
            bits: a tracker that cannot be cut back has them already.

    Raises:
        UserError: one that is asked for is not installed.
    """
    names = config.train.trackers
    require_trackers(names)
    if names is None:
        names = ("tensorboard",) if importlib.util.find_spec("tensorboard") is not None else ()
    return [_Board(config.run.dir, step) if name == "tensorboard" else _Online(name, config, step, told)
            for name in dict.fromkeys(names)]  # fmt: skip


class _Board:
    """TensorBoard's files in the run's folder, cut back as the log is."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Online:
    """wandb, or trackio, which has the same functions. A run from its start is a new one there, a resumed one goes on.

    The project is `fewstep`, or what WANDB_PROJECT or TRACKIO_PROJECT says.
    """

    def __init__(self, module: str, config: RunConfig, step: int, told: int) -> None:
        self._told = told if step else 0
        project = os.environ.get(f"{module.upper()}_PROJECT", "fewstep")
        arguments: dict[str, Any] = {"project": project, "config": config.model_dump(mode="json")}
        arguments |= {"name": config.run.dir.name, "resume": "allow" if step else "never"}
        if module == "wandb":
            arguments |= {"dir": str(config.run.dir), "id": _identity(config.run.dir / "wandb-id", new=not step)}
        self._module: Any = importlib.import_module(module)
        self._run: Any = self._module.init(**arguments)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > self._told:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path, new: bool) -> str:
    """The name that wandb knows this run by: kept in a file, so that a resumed run finds itself."""
    if new or not path.is_file():
        path.write_text(os.urandom(6).hex())
    return path.read_text()
