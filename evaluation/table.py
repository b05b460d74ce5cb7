"""A leaderboard as lines of text cells: the same ones in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .board import TEACHER, Board, Group, Row, grouped

_FIGURES = ("method", "run", "steps", "fd", "of teacher's", "beats teacher", "kid", "accuracy")
_COST = ("guidance", "seed", "training images", "training, wall clock", "a sample takes")
Kind = Literal["teacher", "student", "mean", "seed"]


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        cells: as many as `head`.
        kind: a teacher, a student, the mean over the seeds of one, or one of these seeds.
        better: whether it beats its teacher at equal steps; None where there is nothing to compare.
    """

    cells: tuple[str, ...]
    kind: Kind
    better: bool | None


def head(board: Board) -> tuple[str, ...]:
    """Titles of the columns."""
    return (*_FIGURES, *board.more, *_COST)


def lines(board: Board) -> list[Line]:
    """The board's lines: by steps, then by `fd`; seeds of one method follow their mean."""
    return [line for group in grouped(board.rows) for line in _group(group, board.more)]


def protocol(board: Board) -> list[str]:
    """How the figures came about, in sentences."""
    told, features = board.protocol, board.identity or board.protocol.features
    floor = "" if board.floor is None else f" (other real images in their place: fd {board.floor:.2f})"
    return [
        f"Every row: {told.samples} generated images against {told.samples} real ones of {told.reference}; evaluation "
        f"seed {told.seed}, the same noise and the same real images for all{floor}.",
        f"Features: {features}. fd: Fréchet distance on them; kid: kernel distance ± its standard error; both are "
        "better when smaller, and fd depends on the number of images. accuracy: share of images in which the "
        "shipped classifier sees the class that was asked for.",
        "A teacher is sampled by DDIM, at the guidance of its students, which costs it two evaluations a step where "
        "the scale is not 1. of teacher's: fd over the teacher's at the same steps and guidance; below 1 the student "
        "beats it.",
        "Seeds of one method: mean ± standard deviation over them, then each. Training time is the run's own, by the "
        "clock of the machine that trained it; what an earlier student cost that a run started from is not in it. The "
        "time a sample takes is of the machine that measured the row.",
    ]


def markdown(board: Board, title: str) -> str:
    """The leaderboard as a page of Markdown."""
    titles = head(board)
    table = [titles, ("---",) * len(titles), *(line.cells for line in lines(board))]
    rows = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([f"# {title}", "", *(f"{one}\n" for one in protocol(board)), *rows]) + "\n"


def _group(group: Group, more: Sequence[str]) -> list[Line]:
    if len(group.rows) == 1:
        row = group.rows[0]
        return [_one(row, "teacher" if row.family == TEACHER else "student", more)]
    return [_mean(group, more), *(_one(row, "seed", more) for row in group.rows)]


def _one(row: Row, kind: Kind, more: Sequence[str]) -> Line:
    better = None if row.of_teacher is None else row.of_teacher < 1
    cells = (
        row.method,
        row.run,
        str(row.steps),
        f"{row.fd:.2f}",
        "" if row.of_teacher is None else f"{row.of_teacher:.2f}",
        {None: "", True: "yes", False: "no"}[better],
        f"{row.kid:.4f} ± {row.kid_stderr:.4f}",
        "" if row.accuracy is None else f"{row.accuracy:.3f}",
        *(f"{row.more[name]:.4g}" if name in row.more else "" for name in more),
        f"{row.guidance:g}",
        "" if row.seed is None else str(row.seed),
        "" if row.training_images is None else f"{row.training_images:,}",
        "" if row.training_seconds is None else f"{row.training_seconds:,.0f} s",
        _time(row.seconds_per_image),
    )
    return Line(cells, kind, better)


def _mean(group: Group, more: Sequence[str]) -> Line:
    first, count, shares = group.rows[0], len(group.rows), [row.of_teacher for row in group.rows]
    won = None if None in shares else sum(share is not None and share < 1 for share in shares)
    share = group.mean("of_teacher")
    cells = (
        first.method,
        f"mean of {count}",
        str(first.steps),
        _pair(group, "fd", 2),
        _pair(group, "of_teacher", 2),
        "" if won is None else f"{won} of {count}",
        _pair(group, "kid", 4),
        _pair(group, "accuracy", 3),
        *(_pair(group, name, 3) for name in more),
        f"{first.guidance:g}",
        "",
        _rounded(group.mean("training_images"), ""),
        _rounded(group.mean("training_seconds"), " s"),
        _time(group.mean("seconds_per_image") or 0.0),
    )
    return Line(cells, "mean", None if share is None else share < 1)


def _pair(group: Group, name: str, digits: int) -> str:
    mean = group.mean(name)
    return "" if mean is None else f"{mean:.{digits}f} ± {group.spread(name):.{digits}f}"


def _rounded(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.0f}{unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
