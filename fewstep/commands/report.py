"""`fewstep report`: students beside their teachers, on the same noise and the same real images, in one table."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from fewstep import registry
from fewstep.commands.entrant import Entrant, Teacher, entrant
from fewstep.commands.evaluate import Judge, Request, make_images
from fewstep.commands.real import require_shape
from fewstep.commands.source import Source, open_any
from fewstep.commands.wanted import listed_prompts, sha256_of
from fewstep.errors import UserError
from fewstep.evaluation.board import TEACHER, Board, Protocol, Row, missing_pictures, read_board, write_board
from fewstep.evaluation.grid import save_grid
from fewstep.evaluation.images import Scores
from fewstep.evaluation.page import page
from fewstep.evaluation.strip import read_strip, save_strip
from fewstep.evaluation.table import markdown
from fewstep.training.finished import SOLVER_STEPS

SHOWN = 12  # images of a sampler in the pictures
JSON, PICTURES = "report.json", "pictures"
_COLUMNS = ("fd", "kid", "accuracy")  # figures that every row has a column for


@dataclass(frozen=True)
class Place:
    """A row still without figures: whose samples, in how many steps."""

    row: Row
    entrant: Entrant | None
    open: Callable[[], Source]


def run(
    runs: Sequence[Path], out: Path, request: Request, steps: Sequence[int], earlier: Sequence[Path], title: str
) -> None:
    """Measure what no earlier report has; write `leaderboard.md`, `index.html`, `report.json` and `grid.png`."""
    if not runs and not earlier:
        raise UserError("report: name at least one run or export, or an earlier report with --json")
    told = None if request.prompts is None else listed_prompts(request.prompts)
    protocol = Protocol(request.reference, request.features, request.samples, request.seed,
                        ",".join(request.metrics or ()), sha256_of(told) or "", request.size)  # fmt: skip
    entrants = [entrant(folder, steps) for folder in runs]
    known = [_Known(path.parent, read_board(path)) for path in earlier]
    board = Board(protocol)
    for each in known:
        board = board.merged(each.board)
    _writable(out)
    for each in known:
        _take_pictures(each, board.rows, out)
    board = _without_older(board, entrants)
    known += _there_already(out)
    board = _Measuring(request, out, [each for each in known if each.board.protocol == protocol])(board, entrants)
    _write(out, board.compared(), title)
    typer.echo((out / "leaderboard.md").read_text())
    typer.echo(f"{out / 'index.html'}, {out / 'leaderboard.md'}, {out / JSON}, {out / 'grid.png'}")


@dataclass(frozen=True)
class _Known:
    """An earlier report, and the folder that it lies in."""

    folder: Path
    board: Board


def _there_already(out: Path) -> list[_Known]:
    """What an earlier report left in the same folder, interrupted ones too; one of another version counts for none."""
    try:
        return [_Known(out, read_board(out / JSON))] if (out / JSON).is_file() else []
    except UserError as error:
        typer.echo(f"{error}; everything is measured again", err=True)
        return []


def _without_older(board: Board, entrants: Sequence[Entrant]) -> Board:
    """Without the rows of runs that have been trained further, or anew, since they were measured."""
    now = {_called(_students_row(each, 1)): each.source for each in entrants}
    older = [row for row in board.rows if now.get(_called(row), row.source) != row.source]
    for row in older:
        typer.echo(f"{row.run}, {_steps(row.steps)}: trained since it was measured, its earlier row goes", err=True)
    return replace(board, rows=tuple(row for row in board.rows if row not in older))


def _called(row: Row) -> tuple[str, str, int | None]:
    return row.method, row.run, row.seed


class _Measuring:
    """Fills the places of a board, from earlier reports or by measuring, and writes it after every new row."""

    def __init__(self, request: Request, out: Path, known: Sequence[_Known]) -> None:
        self._request, self._out, self._known = request, out, known
        self._judge: Judge | None = None

    def __call__(self, board: Board, entrants: Sequence[Entrant]) -> Board:
        """The board with a row for each student and teacher at each of their step counts."""
        places = list(_places(entrants, self._request))
        for place in places:
            config = None if place.entrant is None else place.entrant.config.model_dump(mode="json")
            found = self._found(place.row)
            if found is not None:
                board = board.merged(found).with_row(_same_figures(place.row, found.rows[0]), config)
        for place in places:
            if board.find(place.row.key) is None:
                board = self._measured(board, place)
                write_board(self._out / JSON, board)
        return board

    def _found(self, row: Row) -> Board | None:
        """The row of an earlier report as a board of its own, its pictures taken along."""
        for each in self._known:
            same = each.board.find(row.key)
            if same is not None:
                _take_pictures(each, [same], self._out)
                return replace(each.board, rows=(same,), configs={})
        return None

    def _measured(self, board: Board, place: Place) -> Board:
        row, request = place.row, self._request
        typer.echo(f"measuring {row.method} {row.run}, {_steps(row.steps)}", err=True)
        source = place.open()
        self._judge = self._judge or Judge.of(request, source)
        judge = self._judge
        require_shape(request.reference, judge.shape, source)
        made = make_images(
            source, source.sampler_in(row.steps), request.samples, request.batch_size, request.seed, judge.prompts
        )
        scores = judge(made)
        save_strip(self._out / row.pictures, made.images[:SHOWN])
        identity = f"{scores.features}, real images sha256:{scores.reference_sha256[:12]}"
        floor = scores.floor["fd"].value if "fd" in scores.floor else None
        new = Board(board.protocol, classes=source.classes[:SHOWN], identity=identity, floor=floor)
        measured = _measured_row(row, scores, made.seconds_per_image)
        config = None if place.entrant is None else place.entrant.config.model_dump(mode="json")
        return board.merged(new).with_row(measured, config)


def _places(entrants: Sequence[Entrant], request: Request) -> Iterator[Place]:
    """Every row of the table to be: each teacher at every step count of its students and at its own, then these."""
    for teacher in sorted({each.teacher for each in entrants if each.teacher}, key=lambda one: (one.name, one.scale)):
        counts = {count for each in entrants if each.teacher == teacher for count in each.steps}
        opened = _once(lambda one=teacher: open_any(one.path, one.scale, request.size, request.place))
        for count in sorted({*counts, SOLVER_STEPS}):
            yield Place(_teachers_row(teacher, count), None, opened)
    for each in entrants:
        opened = _once(lambda each=each: open_any(str(each.folder), None, request.size, request.place))
        for count in each.steps:
            yield Place(_students_row(each, count), each, opened)


def _once(make: Callable[[], Source]) -> Callable[[], Source]:
    """Opens the source when it is first asked for: what is known already is not even loaded."""
    made: list[Source] = []

    def opened() -> Source:
        if not made:
            made.append(make())
        return made[0]

    return opened


def _teachers_row(teacher: Teacher, count: int) -> Row:
    return _empty_row(teacher.name, "", TEACHER, count, teacher.scale, teacher.source)


def _students_row(each: Entrant, count: int) -> Row:
    name = each.config.method.name
    row = _empty_row(name, each.folder.name, registry.get(name).family, count, each.scale, each.source)
    taught = None if each.teacher is None else each.teacher.source
    return replace(
        row,
        seed=each.config.run.seed,
        training_images=each.images,
        training_seconds=each.seconds,
        teacher=taught,
        settings=each.settings,
    )


def _empty_row(method: str, run: str, family: str, steps: int, guidance: float, source: str) -> Row:
    name = f"{PICTURES}/{method.replace(' ', '-')}-{steps}-{guidance:g}-{source}.png"
    nan = float("nan")
    return Row(
        method, run, family, steps, guidance, nan, nan, nan, None, nan, None, None, None, source, None, source, name
    )


def _measured_row(row: Row, scores: Scores, seconds: float) -> Row:
    more = {name: score.value for name, score in scores.figures.items() if name not in _COLUMNS}
    accuracy = None if scores.accuracy is None else scores.accuracy.value
    return replace(row, fd=scores.fd.value, kid=scores.kid.value, kid_stderr=scores.kid.stderr or 0.0,
                   accuracy=accuracy, seconds_per_image=seconds, more=more)  # fmt: skip


def _same_figures(row: Row, known: Row) -> Row:
    """The row with the figures of an earlier one; what it is called may have changed since."""
    return replace(row, fd=known.fd, kid=known.kid, kid_stderr=known.kid_stderr, accuracy=known.accuracy,
                   seconds_per_image=known.seconds_per_image, pictures=known.pictures, more=known.more)  # fmt: skip


def _take_pictures(known: _Known, rows: Sequence[Row], out: Path) -> None:
    for name in missing_pictures(rows, out):
        if (known.folder / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known.folder / name, out / name)


def _write(out: Path, board: Board, title: str) -> None:
    write_board(out / JSON, board)
    shown = [row for row in board.rows if (out / row.pictures).is_file()]
    if shown:
        titles = [f"{row.method}, {_steps(row.steps)}\n{row.run}" for row in shown]
        save_grid(out / "grid.png", [read_strip(out / row.pictures) for row in shown], titles, scale=2)
    _replace(out / "leaderboard.md", markdown(board, title))
    _replace(out / "index.html", page(board, title, out))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
