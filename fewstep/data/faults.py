"""What goes wrong with the data while a run is reading it."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import RunError


class DataFault(RunError):
    """Data that was whole when the run began cannot be read any more, or nobody is left to read it."""


def vanished(path: Path | str, error: OSError) -> DataFault:
    """What to raise where the system no longer gives a file that was there when the data set was opened."""
    reason = error.strerror or str(error).splitlines()[0]
    return DataFault(f"data.path: {str(path)!r} cannot be read any more ({reason}); put it back")
