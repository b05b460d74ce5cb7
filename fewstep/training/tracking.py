"""The run's log: JSON lines always, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

from fewstep.training.loop import Report


class Log:
    """`log.jsonl` of a run, cut back to `step` on opening, so that a resumed run logs each step once."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        self._started = time.perf_counter() - _cut_back(self._path, step)
        self._board = _tensorboard(folder, step)

    def close(self) -> None:
        """Hand what TensorBoard still holds to the disk."""
        if self._board is not None:
            self._board.close()

    def write(self, report: Report, images: int) -> dict[str, Any]:
        """Log a report and return the line; this waits for the device.

        Args:
            report: the step's.
            images: seen since the run began.
        """
        line: dict[str, Any] = {"step": report.step, "turn": report.turn}
        for name, value in {**report.terms.losses, **report.terms.figures}.items():
            line[f"{report.turn}/{name}"] = float(value)
        for player, norm in report.gradient_norms.items():
            line[f"gradient_norm/{player}"] = float(norm)
        line |= {"seconds": round(time.perf_counter() - self._started, 3), "images": images}
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(key, value, report.step)
        return line


def _cut_back(path: Path, step: int) -> float:
    """Drop the lines after `step`; the seconds of training that the last one left tells of."""
    if not path.is_file():
        return 0.0
    read = [_read(line) for line in path.read_text().splitlines()]
    kept = [line for line in read if line is not None and line["step"] <= step]
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


def _tensorboard(folder: Path, step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
