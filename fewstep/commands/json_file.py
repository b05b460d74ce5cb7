"""Figures as a JSON file, which is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import UserError


def require_writable(option: str, path: Path | None) -> None:
    """Make the folder of a file that a long command writes at its end; None is no file.

    Raises:
        UserError: the file cannot be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder, a file is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}: {path} cannot be written (no permission)")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values`; an interrupted write leaves the earlier file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)
