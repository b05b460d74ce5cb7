"""A file system of its own, to be filled and remounted."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path


def mount(place: Path, *words: str) -> None:
    """A file system in memory, or another setting of one that is there."""
    subprocess.run(["mount", *words, "tmpfs", str(place)], check=True, capture_output=True)


def fill(disk: Path, leave: int) -> Path:
    """Write until nothing more fits but `leave` bytes."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(path, path.stat().st_size - leave)
    return path
