"""Names to methods, through the entry-point group `fewstep.methods`: built-ins and third parties by the same door."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from fewstep.errors import UserError, did_you_mean
from fewstep.section import Section

if TYPE_CHECKING:
    from fewstep.training.method import Method

GROUP = "fewstep.methods"


class MethodConfig(Section):
    """What every method's config has: its name. Fields carry their docs."""

    name: str
    """The method's registered name."""


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def names() -> tuple[str, ...]:
    """The registered names, sorted; nothing is imported."""
    return tuple(sorted(_entries()))


def get(name: str) -> type[Method]:
    """The method class of that name.

    Raises:
        UserError: no method has the name, or the package that registers it cannot be imported.
    """
    entries = _entries()
    if name not in entries:
        known = ", ".join(names())
        raise UserError(f"unknown method {name!r}; registered: {known}{did_you_mean(name, entries)}")
    try:
        return entries[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"method {name!r}: {entries[name].value} cannot be imported ({error})") from error


def methods() -> dict[str, type[Method]]:
    """Every registered method, by name."""
    return {name: get(name) for name in names()}
