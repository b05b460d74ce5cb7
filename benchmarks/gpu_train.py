"""Teacher and students of the emoji, trained on a device in the time that there is."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_clock import Section
from fewstep import registry

REPORT = 60.0
"""Seconds kept for the table."""

SAVE = 10.0
"""Seconds that the last run has to save where it is, before it would be cut short."""


def trained(out: Path, section: Section, tiny: bool) -> None:
    """A teacher from scratch, then every method of the leaderboard that learns without stored pairs, and their table.

    Each has its share of the time that is left. A run that is cut short saves where it is, and counts.
    """
    words = ["train.steps=2", "train.sample_every=0", "data.batch_size=4"] if tiny else []
    names = ["dmd2"] if tiny else [name for name in registry.names() if not registry.get(name).claims.pairs]
    ends = section.ends
    section.ends -= 0 if tiny else REPORT
    for place, name in enumerate(sorted(names, key=lambda name: registry.get(name).needs_teacher)):
        share = (section.ends - SAVE - time.monotonic()) / (len(names) - place)
        command = ["train", f"emoji32/{name}", f"run.dir={out / 'runs' / name}", *words]
        section.measure(f"train {name}", partial(_command, command, share))
    section.ends = ends
    done = [str(path.parent) for path in sorted(out.glob("runs/*/config.json"))]
    if done and not tiny:
        section.measure("report", partial(_command, ["report", *done, "--out", str(out / "report")], REPORT))


def _command(words: list[str], seconds: float) -> dict[str, Any]:
    """A command of fewstep in a process of its own, told to end when its time is over."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fewstep", *words], stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves where it is
        _, said = process.communicate()
    finally:
        process.kill()
    return {"seconds": time.monotonic() - start, "code": process.returncode, "last": said.strip()[-200:]}
