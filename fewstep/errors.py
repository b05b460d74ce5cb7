"""Mistakes a user can make, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the place, what was found, what is allowed. Ends with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on through no mistake in the request. Ends with exit code 1."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
