"""A leaderboard as one HTML file that needs nothing beside itself: pictures inside, no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import yaml

from fewstep import __version__

from .board import TEACHER, Board, Group, Row, grouped
from .plot import Level, Point, Series, chart
from .strip import spaced
from .table import Line, head, lines, protocol

_STYLE = Path(__file__).parent / "page.css"
_TEXT_COLUMNS = 2  # the first ones of the table; all others hold numbers


def page(board: Board, title: str, folder: Path) -> str:
    """The page.

    Args:
        board: compared, so that its rows are in order.
        title: of the page.
        folder: where the rows' pictures lie; a row without one has no samples on the page.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="protocol">{escape(sentence)}</p>' for sentence in protocol(board)),
        f"<p>{_won(board.rows)}</p>",
        _table(board),
        *_section("Quality against steps", [_by_steps(board)]),
        *_section("Quality against what training cost", _by_cost(board)),
        *_section("Samples", _samples(board, folder)),
        *_section("Settings", _settings(board)),
        f"<footer>fewstep {escape(__version__)}</footer>",
    ]
    inside = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE.read_text(encoding="utf-8")}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    whole = f"<head>{inside}{view}</head>\n<body><main>\n{body}\n</main></body>"
    return f'<!doctype html>\n<html lang="en">\n{whole}\n</html>\n'


def _section(title: str, content: Sequence[str]) -> list[str]:
    """A headed section, or nothing where there is nothing to show."""
    return [f"<h2>{title}</h2>", *content] if content else []


def _won(rows: Iterable[Row]) -> str:
    shares = [row.of_teacher for row in rows if row.of_teacher is not None]
    if not shares:
        return "No row has its teacher beside it."
    return f"{sum(share < 1 for share in shares)} of {len(shares)} students' rows beat their teacher at equal steps."


def _table(board: Board) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head(board))
    body = "\n".join(map(_line, lines(board)))
    table = f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="wide">{table}</div>'


def _line(line: Line) -> str:
    cells = "".join(
        f"<td{' class=number' if i >= _TEXT_COLUMNS else ''}>{escape(cell)}</td>" for i, cell in enumerate(line.cells)
    )
    better = {None: "", True: " better", False: " worse"}[line.better]
    return f'<tr class="{line.kind}{better}">{cells}</tr>'


def _by_steps(board: Board) -> str:
    """Mean `fd` of each method and teacher at its step counts, joined where one of them serves several."""
    found: dict[tuple[str, float], list[Group]] = {}
    for group in grouped(board.rows):
        found.setdefault((group.rows[0].method, group.rows[0].guidance), []).append(group)
    counts = sorted({row.steps for row in board.rows})
    series = [_best(groups) for groups in found.values()]
    labels = ("steps (network evaluations)", "fd, smaller is better")
    return _legend(board) + chart("fd by steps", *labels, series, x_ticks=counts)


def _best(groups: Sequence[Group]) -> Series:
    """One point for each step count: of several settings the best."""
    best: dict[int, Group] = {}
    for group in groups:
        best.setdefault(group.rows[0].steps, group)  # the smallest mean of its step count comes first
    points = (Point(steps, _fd(group), _told(group)) for steps, group in sorted(best.items()))
    return Series(_name(groups[0]), groups[0].rows[0].family, tuple(points))


def _by_cost(board: Board) -> list[str]:
    """A plot for each step count at which a student's training time is known, the teacher as a level."""
    plots = []
    for count in sorted({row.steps for row in board.rows}):
        groups = [group for group in grouped(board.rows) if group.rows[0].steps == count]
        taught = [group for group in groups if group.rows[0].family == TEACHER]
        timed = [group for group in groups if group.mean("training_seconds")]
        if not timed:
            continue
        names = [_name(group) for group in timed]
        series = [
            Series(
                name if names.count(name) == 1 else f"{name}, {group.rows[0].run}",
                group.rows[0].family,
                (_point(group),),
            )
            for name, group in zip(names, timed, strict=True)
        ]
        levels = [Level(_name(group), TEACHER, _fd(group)) for group in taught]
        title = _steps(count)
        plots.append(chart(title, "training, seconds by the clock", "fd, smaller is better", series, levels))
    return [f'<div class="plots">{"".join(plots)}</div>'] if plots else []


def _point(group: Group) -> Point:
    return Point(max(group.mean("training_seconds") or 0.0, 1e-3), _fd(group), _told(group))


def _fd(group: Group) -> float:
    return max(group.mean("fd") or 0.0, 1e-3)  # a logarithmic axis has no place for less


def _name(group: Group) -> str:
    return _of(group.rows[0])


def _of(row: Row) -> str:
    return row.method if row.guidance == 1 else f"{row.method}, s = {row.guidance:g}"


def _told(group: Group) -> str:
    row, seeds = group.rows[0], len(group.rows)
    of = f"mean of {seeds} seeds" if seeds > 1 else row.run
    return f"{_name(group)}, {_steps(row.steps)}: fd {_fd(group):.2f}" + (f" ({of})" if of else "")


def _legend(board: Board) -> str:
    families = sorted({row.family for row in board.rows}, key=lambda family: (family == TEACHER, family))
    keys = "".join(f'<span class="key {escape(one)}">{escape(one.replace("_", " "))}</span>' for one in families)
    return f'<p class="legend">{keys}</p>'


def _samples(board: Board, folder: Path) -> list[str]:
    """The same noise in every column."""
    shown = [row for row in board.rows if (folder / row.pictures).is_file()]
    if not shown:
        return []
    told = f" From left to right: {', '.join(board.classes)}." if board.classes else ""
    parts = [f"<p>One column is one noise, the same for all.{escape(told)}</p>"]
    for count in sorted({row.steps for row in shown}):
        figures = "\n".join(_picture(row, folder / row.pictures) for row in shown if row.steps == count)
        parts.append(f'<h3>{_steps(count)}</h3>\n<div class="samples">{figures}</div>')
    return parts


def _picture(row: Row, path: Path) -> str:
    seed = "" if row.seed is None else f", seed {row.seed}"
    what = f"{row.method}, {_steps(row.steps)}"
    data = base64.b64encode(spaced(path)).decode()
    under = f"fd {row.fd:.2f}{f' · {row.run}{seed}' if row.run else ''}"
    image = f'<img src="data:image/png;base64,{data}" alt="samples of {escape(what)}">'
    return f"<figure><figcaption>{escape(_of(row))}<small>{escape(under)}</small></figcaption>{image}</figure>"


def _settings(board: Board) -> list[str]:
    """Every student's resolved config, folded up."""
    runs = {row.source: row for row in board.rows if row.source in board.configs}
    return [
        f"<details><summary>{escape(row.method)} <small>{escape(row.run)}</small></summary>"
        f"<pre>{escape(yaml.safe_dump(dict(board.configs[source]), sort_keys=False))}</pre></details>"
        for source, row in runs.items()
    ]


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"
