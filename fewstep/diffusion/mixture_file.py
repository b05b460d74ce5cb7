"""Mixtures as JSON files, read with one clear line for each mistake."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, did_you_mean

KEYS = ("weights", "means", "stds", "labels")


@dataclass(frozen=True)
class MixtureTable:
    """The values of a mixture file: lists of numbers of whatever lengths the file has.

    Attributes:
        weights: one for each component.
        means: numbers, or lists of numbers.
        stds: one for each component.
        labels: one whole number for each component, or None.
    """

    weights: list[float]
    means: list[list[float]]
    stds: list[float]
    labels: list[int] | None


def read_mixture(path: Path) -> MixtureTable:
    """The table in `path`; a one-dimensional mean may be a bare number.

    Raises:
        UserError: no such file, not JSON, not an object, unknown or missing keys, or values that are not numbers.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    try:
        return _table(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _table(found: Any) -> MixtureTable:
    if not isinstance(found, dict):
        raise UserError(f"a {type(found).__name__} given, an object with the keys {', '.join(KEYS)} needed")
    for key in found:
        if key not in KEYS:
            raise UserError(f"{key}: unknown key, allowed are {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
    for key in KEYS[:3]:
        if key not in found:
            raise UserError(f"{key}: missing")
    means = [_numbers("means", row if isinstance(row, list) else [row]) for row in _list("means", found["means"])]
    return MixtureTable(
        _numbers("weights", found["weights"]), means, _numbers("stds", found["stds"]), _labels(found.get("labels"))
    )


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{key}: {value!r} given, a list needed")
    return value


def _numbers(key: str, value: Any) -> list[float]:
    for x in _list(key, value):
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise UserError(f"{key}: {x!r} given, a number needed")
    return [float(x) for x in value]


def _labels(value: Any) -> list[int] | None:
    if value is None:
        return None
    for x in _list("labels", value):
        if isinstance(x, bool) or not isinstance(x, int):
            raise UserError(f"labels: {x!r} given, a whole number needed")
    return value
