"""Ends that come from outside, told in one line: a full disk, data that has gone, another process that has gone."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.data.faults import DataFault
from fewstep.errors import RunError
from fewstep.training.processes import lost_another, several
from fewstep.training.retention import list_checkpoints

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM,
                errno.ESTALE}  # fmt: skip


def what_is_left(checkpoints: Path) -> str:
    """Where the same command goes on."""
    found = list_checkpoints(checkpoints)
    return f"the same command goes on from {found[-1].name}" if found else "there is no checkpoint yet"


@contextmanager
def ends_told(checkpoints: Path) -> Iterator[None]:
    """Inside, an exchange that fails because another process has gone, a disk that refuses, and data that cannot be
    read any more are one line.

    Raises:
        RunError: one of them happened.
    """
    try:
        yield
    except DataFault as error:
        raise RunError(f"{error}; {what_is_left(checkpoints)}") from error
    except OSError as error:
        if error.errno not in _OF_THE_DISK and not _is_gone(checkpoints.parent, error):
            raise
        place = error.filename or checkpoints.parent
        raise RunError(f"{place}: cannot be written ({error.strerror}); {what_is_left(checkpoints)}") from error
    except RuntimeError as error:
        if not (several() and lost_another(error)):
            raise
        raise RunError(f"another process of this run has gone; {what_is_left(checkpoints)}") from error


def _is_gone(run: Path, error: OSError) -> bool:
    """Whether somebody has removed the folder that a file of the run was to be written to."""
    return error.errno == errno.ENOENT and error.filename is not None and Path(error.filename).is_relative_to(run)
