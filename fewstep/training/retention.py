"""Which checkpoints of a folder stay, and the link to the latest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LATEST = "latest"
STATE = "state.json"
PREFIX = "step-"
PARTIAL = ".partial-"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first; what has another name, such as a copy, is none of the run."""
    named = (p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal())
    return sorted(p for p in named if (p / STATE).is_file())


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def superfluous(found: Sequence[Path], keep_last: int, keep_every: int | None) -> list[Path]:
    """Those of `found`, oldest first, that go: all but the last `keep_last` and the multiples of `keep_every`."""
    return [one for one in found[:-keep_last] if keep_every is None or step_of(one) % keep_every]


def drop(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, under another name: half removed it must not pass for a whole one."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{PARTIAL}old-{checkpoint.name}")))


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind, as far as the disk lets it."""
    for left in folder.glob(f"{PARTIAL}*"):
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)


def point_at(checkpoint: Path) -> None:
    """Make the link `latest` lead to a whole checkpoint, in one stroke; there is none on a disk without links."""
    link, fresh = checkpoint.with_name(LATEST), checkpoint.with_name(f"{PARTIAL}{LATEST}")
    with suppress(OSError):
        fresh.symlink_to(checkpoint.name, target_is_directory=True)
        os.replace(fresh, link)
    with suppress(OSError):  # where something else is called so: a folder, of a copy that follows links
        fresh.unlink()
