"""A leaderboard's rows, kept as JSON so that a later report takes up those that it need not measure again."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

TEACHER = "teacher"  # the family of teachers' rows
_LATER = ("prompts", "size")  # of the protocol, that earlier versions did not write


@dataclass(frozen=True)
class Protocol:
    """How every row was measured. Rows of two protocols do not stand in one table.

    Attributes:
        reference: the real set: a data set's name or a folder.
        features: the feature network's name.
        samples: images on each side.
        seed: of the noise and of the real samples.
        metrics: names of further metrics, with commas between; empty for none.
        prompts: hash of the prompts in a file; empty where the reference's captions are drawn, or no prompts.
        size: side of the images in pixels, of sources of latents; None: their own.
    """

    reference: str
    features: str
    samples: int
    seed: int
    metrics: str = ""
    prompts: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Row:
    """One sampler's figures.

    Attributes:
        method: the method's name; of a teacher, "teacher" and its own.
        run: what the run or export is called; empty for a teacher.
        family: the method's; "teacher" for a teacher.
        steps: network evaluations per sample (each a pair where a teacher is guided).
        guidance: the scale, 1 where it is off.
        fd: Fréchet distance.
        kid: kernel distance, with its standard error.
        accuracy: share of images that show the class asked for; None where the features know no classes.
        seconds_per_image: of sampling, on the machine that measured.
        seed: of the training.
        training_images: seen in training; None where it is not known.
        training_seconds: of training, by the clock; None where it is not known.
        source: hash of the weights and of everything else that decides its samples.
        teacher: the same of its teacher; None for teachers and for students without one.
        settings: hash of the run's config without its seed and places: seeds of one method share it.
        pictures: name of the file with its first samples, beside the JSON.
        of_teacher: `fd` as a share of the teacher's at the same steps and guidance; None where that has no row.
        more: further figures by name.
    """

    method: str
    run: str
    family: str
    steps: int
    guidance: float
    fd: float
    kid: float
    kid_stderr: float
    accuracy: float | None
    seconds_per_image: float
    seed: int | None
    training_images: int | None
    training_seconds: float | None
    source: str
    teacher: str | None
    settings: str
    pictures: str
    of_teacher: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, float]:
        """What a row is about: two of one key under one protocol have the same figures."""
        return self.source, self.steps, self.guidance


@dataclass(frozen=True)
class Group:
    """Runs of one method and settings at one step count, which differ by their seed; a teacher is a group of one."""

    rows: tuple[Row, ...]

    def mean(self, name: str) -> float | None:
        """The mean of a column; None where a row lacks it."""
        values = self._values(name)
        return None if values is None else statistics.fmean(values)

    def spread(self, name: str) -> float:
        """The standard deviation of a column over the seeds, N − 1 in the denominator."""
        values = self._values(name)
        return statistics.stdev(values) if values is not None and len(values) > 1 else 0.0

    def _values(self, name: str) -> list[float] | None:
        values = [row.more[name] if name in row.more else getattr(row, name, None) for row in self.rows]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None


@dataclass(frozen=True)
class Board:
    """A leaderboard.

    Attributes:
        protocol: of every row.
        rows: in no order.
        configs: the resolved config of every student, by `Row.source`.
        classes: what the first pictures of every row show, where classes have names.
        identity: the feature network with its weights, and the real images; empty until a row was measured.
        floor: `fd` of other real images in the place of generated ones; None where it was not measured.
    """

    protocol: Protocol
    rows: tuple[Row, ...] = ()
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    identity: str = ""
    floor: float | None = None

    def find(self, key: tuple[str, int, float]) -> Row | None:
        """The row of that key."""
        return next((row for row in self.rows if row.key == key), None)

    def with_row(self, row: Row, config: Mapping[str, Any] | None) -> Board:
        """With one more row, in place of an earlier one of its key."""
        configs = self.configs if config is None else {**self.configs, row.source: config}
        return replace(self, rows=(*(r for r in self.rows if r.key != row.key), row), configs=configs)

    def merged(self, other: Board) -> Board:
        """With the other's rows too.

        Raises:
            UserError: they were measured otherwise.
        """
        require_same(self, other)
        board = self
        for row in other.rows:
            board = board.with_row(row, other.configs.get(row.source))
        floor = self.floor if self.floor is not None else other.floor
        identity, classes = self.identity or other.identity, self.classes or other.classes
        return replace(board, classes=classes, identity=identity, floor=floor)

    @property
    def more(self) -> tuple[str, ...]:
        """Names of the further figures of any row."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.more))

    def compared(self) -> Board:
        """With `of_teacher` of every student that has its teacher's row, in the order of the table."""
        taught = {row.key: row.fd for row in self.rows if row.family == TEACHER}
        rows = (replace(row, of_teacher=_share(row, taught)) for row in self.rows)
        return replace(self, rows=tuple(row for group in grouped(rows) for row in group.rows))


def _share(row: Row, taught: Mapping[tuple[str, int, float], float]) -> float | None:
    if row.teacher is None or not taught.get((row.teacher, row.steps, row.guidance)):
        return None
    return row.fd / taught[row.teacher, row.steps, row.guidance]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Rows by settings, the fewest steps first and there the smallest mean `fd`."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.seed or 0, row.training_seconds is None, row.fd)):
        place = (row.method, row.settings, row.teacher, row.steps, row.guidance, 0)
        while any(other.seed == row.seed for other in found.get(place, ())):
            place = (*place[:-1], place[-1] + 1)  # a run and its own export are no two seeds
        found.setdefault(place, []).append(row)
    groups = [Group(tuple(members)) for members in found.values()]
    return sorted(groups, key=lambda group: (group.rows[0].steps, group.mean("fd") or 0.0))


def require_same(one: Board, other: Board) -> None:
    """Does nothing where the rows of both may stand in one table.

    Raises:
        UserError: they were measured on other images, features or noise.
    """
    for name in (each.name for each in fields(Protocol)):
        here, there = getattr(one.protocol, name), getattr(other.protocol, name)
        if here != there:
            here, there = ("not given" if value in ("", None) else value for value in (here, there))
            raise UserError(f"report: {name} is {here} here and {there} in the earlier one; measure all rows alike")
    if one.identity and other.identity and one.identity != other.identity:
        raise UserError(f"report: features {one.identity} here and {other.identity} in the earlier one; measure anew")


def write_board(path: Path, board: Board) -> None:
    """Write the board as JSON, whole or not at all."""
    values = {**asdict(board.protocol), "identity": board.identity, "classes": board.classes, "floor": board.floor,
              "rows": [asdict(row) for row in board.rows], "configs": dict(board.configs)}  # fmt: skip
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def read_board(path: Path) -> Board:
    """The board of an earlier report.

    Raises:
        UserError: the file is missing, or no report of this version.
    """
    try:
        values = json.loads(path.read_text())
        rows = tuple(Row(**row) for row in values["rows"])
        stated = [each.name for each in fields(Protocol) if each.name in values or each.name not in _LATER]
        protocol = Protocol(**{name: values[name] for name in stated})
        classes = tuple(values["classes"])
        return Board(protocol, rows, values["configs"], classes, values["identity"], values["floor"])
    except OSError as error:
        raise UserError(f"--json: {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json: {path} is no report.json that this version of `fewstep report` wrote") from error


def missing_pictures(rows: Sequence[Row], folder: Path) -> list[str]:
    """Names of the pictures that `folder` lacks."""
    return [row.pictures for row in rows if not (folder / row.pictures).is_file()]
