"""The best checkpoint of a run by a metric: kept beside the latest ones, as a run's folder of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LINK = "best"
_STORE = ".best"
_PARTIAL = ".partial"
_TERMS = ("features", "classifier", "images", "real_images", "reference_sha256", "prompts_sha256", "seed", "steps")


def best_step(lines: Sequence[Mapping[str, Any]], metric: str, rising: bool) -> int | None:
    """The step of the best evaluation in a log, the earlier of two equal ones; None where there is none.

    Only those count that were made as the last one: figures of other features or counts cannot be compared.

    Args:
        lines: of the log.
        metric: which figure.
        rising: more of it is better.
    """
    key = f"evaluate/{metric}"
    measured = [line for line in lines if line.get(key) is not None]
    if not measured:
        return None
    alike = [line for line in measured if _terms(line) == _terms(measured[-1])]
    sign = -1 if rising else 1
    return min(alike, key=lambda line: (sign * line[key], line["step"]))["step"]


def _terms(line: Mapping[str, Any]) -> list[Any]:
    """What an evaluation's figures depend on besides the weights."""
    return [line.get(f"evaluate/{name}") for name in _TERMS]


def kept_step(run: Path) -> int | None:
    """The step of the checkpoint that is kept, if there is one."""
    link = run / LINK
    return int(link.readlink().name.rpartition("-")[2]) if link.is_symlink() else None


def keep(run: Path, checkpoint: Path) -> None:
    """Make `run/best` a folder with the run's config and this checkpoint, which `export`, `sample` and `evaluate` take.

    The files are shared with the checkpoint where the file system can (nothing writes into a finished one). `best` is
    a link that is replaced in one stroke: whenever the process is killed, it leads to a whole checkpoint.
    """
    store = run / _STORE
    partial, final = store / _PARTIAL, store / checkpoint.name
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial / "checkpoints" / checkpoint.name, copy_function=_link)
    shutil.copyfile(run / "config.json", partial / "config.json")
    if final.is_dir():  # of an earlier start of the run: the same step, other weights
        forget(run)
        shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    fresh = store / "link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(_STORE) / checkpoint.name, target_is_directory=True)
    os.replace(fresh, run / LINK)
    for old in store.glob("step-*"):
        if old.name != checkpoint.name:
            shutil.rmtree(old)


def forget(run: Path) -> None:
    """No checkpoint is kept any more: a run that starts anew has none."""
    (run / LINK).unlink(missing_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
