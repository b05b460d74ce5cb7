"""A folder that appears whole or not at all, and never in place of something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.errors import UserError

from .manifest import is_export


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, in place of an earlier export there.

    Raises:
        UserError: `out` holds something other than an export, or cannot be written.
    """
    _refuse_foreign(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, out)
    except OSError as error:
        raise UserError(f"export: {out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    if not out.name:
        raise UserError(f"export: {out} has no name to be put in place by; give a folder inside it")
    if out.exists() and not out.is_dir():
        raise UserError(f"export: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"export: {out} holds something other than an export; give a new folder")


def _put_in_place(partial: Path, out: Path) -> None:
    """An earlier export steps aside first and goes last, so that a failure between leaves one of the two."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
