"""`fewstep report`: students beside their teachers, on the same noise and the same real images, in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer

from fewstep import registry
from fewstep.commands.evaluate import Judge, Made, Request, make_images
from fewstep.commands.json_file import write_json
from fewstep.commands.source import Source, open_source
from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.evaluation.grid import save_grid
from fewstep.models.guidance_input import middle
from fewstep.models.load import embedded_teachers
from fewstep.training.finished import SOLVER_STEPS, read_config

SHOWN = 12  # images of a sampler in the picture


@dataclass(frozen=True)
class Entrant:
    """A student, with what made it.

    Attributes:
        folder: of the run.
        config: of the run.
        steps: the step counts at which it is measured.
        seconds: of training.
        images: seen in training.
    """

    folder: Path
    config: RunConfig
    steps: tuple[int, ...]
    seconds: float
    images: int

    @property
    def teacher(self) -> tuple[str, float]:
        """The path and the guidance of what it imitates."""
        assert self.config.teacher.path is not None
        return self.config.teacher.path, _scale(self.config)


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard. `of_teacher` is `fd` as a share of the teacher's at the same steps."""

    method: str
    steps: int
    fd: float
    kid: float
    kid_stderr: float
    accuracy: float | None
    of_teacher: float | None
    guidance: float
    seed: int | None
    training_images: int | None
    training_seconds: float | None
    seconds_per_image: float


def run(runs: Sequence[Path], out: Path, request: Request, steps: Sequence[int]) -> None:
    """Measure every run and its teacher; write `leaderboard.md`, `report.json` and `grid.png` into `out`."""
    entrants = [_entrant(folder, steps) for folder in runs]
    _writable(out)
    board = _Board(request)
    rows = board.teachers(entrants)
    for entrant in entrants:
        rows += board.student(entrant, rows)
    rows.sort(key=lambda row: (row.steps, row.fd))
    _write(out, rows, request)
    board.picture(out / "grid.png")
    typer.echo((out / "leaderboard.md").read_text())
    typer.echo(f"{out / 'leaderboard.md'}, {out / 'report.json'}, {out / 'grid.png'}")


def _entrant(folder: Path, steps: Sequence[int]) -> Entrant:
    config = read_config(folder)
    if config.teacher.path is None:
        raise UserError(f"{folder}: a student of a teacher is needed, this run has no teacher.path")
    claims = registry.get(config.method.name).claims
    own = (config.student.steps,) if not claims.one_student else claims.steps
    last = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]
    return Entrant(folder, config, tuple(steps) or own, float(last["seconds"]), int(last["images"]))


def _scale(config: RunConfig) -> float:
    """The scale at which a student is sampled, and so its teacher too: of a range the middle."""
    given = config.method.model_dump().get("guidance_range") or config.teacher.guidance
    return middle(given) if isinstance(given, tuple) else given


class _Board:
    """Measures one sampler after the other, and keeps the first images of each for the picture."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._judge: Judge | None = None
        self._shown: dict[str, Made] = {}

    def teachers(self, entrants: Sequence[Entrant]) -> list[Row]:
        """Each teacher at every step count of its students, and at its own."""
        rows: list[Row] = []
        for path, scale in sorted({entrant.teacher for entrant in entrants}):
            source = open_source(path, scale)
            counts = {n for entrant in entrants if entrant.teacher == (path, scale) for n in entrant.steps}
            for count in sorted({*counts, SOLVER_STEPS}):
                rows.append(self._row(source, f"teacher {_short(path)}", count, scale, None))
        return rows

    def student(self, entrant: Entrant, teachers: Sequence[Row]) -> Iterator[Row]:
        """The rows of one run."""
        source = open_source(str(entrant.folder))
        path, scale = entrant.teacher
        for count in entrant.steps:
            row = self._row(source, entrant.config.method.name, count, scale, entrant)
            alike = [
                t for t in teachers if (t.method, t.steps, t.guidance) == (f"teacher {_short(path)}", count, scale)
            ]
            yield Row(**{**asdict(row), "of_teacher": row.fd / alike[0].fd})

    def _row(self, source: Source, name: str, count: int, scale: float, entrant: Entrant | None) -> Row:
        request = self._request
        typer.echo(f"measuring {name}, {count} step{'s' * (count > 1)}", err=True)
        made = make_images(source, source.sampler_in(count), request.samples, request.batch_size, request.seed)
        self._judge = self._judge or Judge.of(request, source)
        scores = self._judge(made)
        self._shown[f"{name}, {count}"] = Made(made.images[:SHOWN], None, made.seconds_per_image)
        accuracy = None if scores.accuracy is None else scores.accuracy.value
        cost = (None, None, None) if entrant is None else (entrant.config.run.seed, entrant.images, entrant.seconds)
        stderr = scores.kid.stderr or 0.0
        return Row(name, count, scores.fd.value, scores.kid.value, stderr, accuracy, None, scale, *cost,
                   made.seconds_per_image)  # fmt: skip

    def picture(self, path: Path) -> None:
        """A row for each sampler, a column for each noise."""
        rows = [torch.as_tensor(made.images) for made in self._shown.values()]
        save_grid(path, rows, list(self._shown), scale=2)


def _short(path: str) -> str:
    return path if path in embedded_teachers() else Path(path).name


def _write(out: Path, rows: Sequence[Row], request: Request) -> None:
    facts = {"reference": request.reference, "features": request.features, "samples": request.samples,
             "seed": request.seed}  # fmt: skip
    write_json(out / "report.json", {**facts, "rows": [asdict(row) for row in rows]})
    lines = [
        f"{request.samples} images a row against {request.samples} of {request.reference}, features "
        f"{request.features}, evaluation seed {request.seed}; the same noise for all.",
        "",
        "| method | steps | fd | of teacher's | kid | accuracy | guidance | seed | training images | training time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    partial = out / ".leaderboard.partial"
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(out / "leaderboard.md")


def _line(row: Row) -> str:
    share = "" if row.of_teacher is None else f"{row.of_teacher:.2f}"
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f}"
    images = "" if row.training_images is None else f"{row.training_images:,}"
    seconds = "" if row.training_seconds is None else f"{row.training_seconds:.0f} s"
    seed = "" if row.seed is None else str(row.seed)
    return (
        f"| {row.method} | {row.steps} | {row.fd:.2f} | {share} | {row.kid:.4f} ± {row.kid_stderr:.4f} | {accuracy} "
        f"| {row.guidance:g} | {seed} | {images} | {seconds} |"
    )


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
