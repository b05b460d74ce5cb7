"""`fewstep sample`: a picture with a row for each subject and seed, and a column for each step count."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from fewstep.commands.elsewhere import Place
from fewstep.commands.entrant import scale_of
from fewstep.commands.source import Source, open_any
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.grid import save_grid
from fewstep.models.conditioning import Condition
from fewstep.pipelines.manifest import is_export, read_manifest
from fewstep.training.finished import SOLVER_STEPS, read_config

ROWS = 8
TEACHER_STEPS = (1, 2, 4, SOLVER_STEPS)
_PROMPT_LETTERS = 24  # of a row's title, a line


@dataclass(frozen=True)
class Request:
    """What is drawn.

    Attributes:
        source: a run's folder, an export, or a teacher.
        steps: step counts; none: its own.
        classes: names or numbers.
        prompts: of a text pipeline.
        seeds: of the noise; none: 0, or 0 to 7 where there is nothing else to draw.
        guidance: of a teacher, or a student that takes one.
        size: side of the images in pixels, where samples are latents.
        beside_teacher: whether the teacher's samples stand beside the student's.
        teacher_steps: its step counts; none: the student's, and 32.
        trajectory: whether every step's x̂_0 is drawn, a row a sampling.
        device: where networks compute; noise is the host's.
        encoders: whether text encoders and VAE stay on the device, or rest in the host's memory between calls.
    """

    source: str
    steps: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    guidance: float | None = None
    size: int | None = None
    beside_teacher: bool = False
    teacher_steps: tuple[int, ...] = ()
    trajectory: bool = False
    device: str = "cpu"
    encoders: str = "device"

    @property
    def place(self) -> Place:
        """Device and resting place.

        Raises:
            UserError: there is no such device.
        """
        return Place.named(self.device, self.encoders)


@dataclass(frozen=True)
class _Subject:
    """One row: what is asked for, in whose noise."""

    title: str
    condition: Condition
    seed: int


@dataclass(frozen=True)
class _Column:
    """One sampler, and what it is called."""

    title: str
    source: Source
    sampler: Sampler

    def predictions(self, subject: _Subject) -> Iterator[Tensor]:
        """Every step's x̂_0 `(1, C, H, W)`: a function of the subject alone, whatever else is drawn."""
        noise = torch.randn(1, *self.source.shape, generator=torch.Generator().manual_seed(subject.seed))
        return self.source.predictions(self.sampler, noise, subject.condition, subject.seed + 1)


def run(request: Request, out: Path) -> None:
    """Write the picture, and print what a sample of each step count takes.

    Raises:
        UserError: what is asked for cannot be drawn, or not into a file of that name.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: {out} given; the name of a picture ends in .png")
    source = open_any(request.source, request.guidance, request.size, request.place)
    subjects = _subjects(source, request)
    columns = _columns(source, request)
    if request.trajectory:
        _draw_trajectories(out, columns, subjects)
    else:
        _draw_grid(out, columns, subjects)
    typer.echo(f"wrote {out}")


def _draw_grid(out: Path, columns: Sequence[_Column], subjects: Sequence[_Subject]) -> None:
    made = []
    for column in columns:
        clock = time.perf_counter()
        made.append([_last(column.predictions(subject)) for subject in subjects])
        typer.echo(f"{column.title}: {(time.perf_counter() - clock) / len(subjects):.3g} s/image")
    rows = [torch.cat(images) for images in zip(*made, strict=True)]
    titles = [column.title.replace(", ", "\n") for column in columns]
    save_grid(out, rows, [subject.title for subject in subjects], titles, _scale(rows[0]))


def _draw_trajectories(out: Path, columns: Sequence[_Column], subjects: Sequence[_Subject]) -> None:
    """From the noise end to the sample; rows of fewer steps are shorter."""
    rows, titles = [], []
    for subject in subjects:
        for column in columns:
            rows.append(torch.cat(list(column.predictions(subject))))
            titles.append(f"{column.title}\n{subject.title}")
    save_grid(out, rows, titles, scale=_scale(rows[0]), ragged=True)


def _last(predictions: Iterator[Tensor]) -> Tensor:
    *_, image = predictions
    return image


def _scale(images: Tensor) -> int:
    """Small pictures are enlarged, large ones are not."""
    return max(1, min(3, 96 // images.shape[-1]))


def _subjects(source: Source, request: Request) -> list[_Subject]:
    """Each class or prompt in each seed's noise."""
    if request.classes and request.prompts:
        raise UserError("sample: classes or prompts are drawn, not both in one picture")
    if request.prompts:
        things = [(_lines(prompt), source.of_prompts([prompt])) for prompt in request.prompts]
    elif source.class_count or request.classes:
        numbers = [source.class_number(word) for word in request.classes] or range(min(ROWS, source.class_count))
        things = [(_class_title(source, n), Condition.of_labels(torch.tensor([n]))) for n in numbers]
    elif source.encoder is not None:
        raise UserError("sample: a text pipeline draws what a prompt says; give --prompt, once or more often")
    else:
        things = [("", Condition.none())]
    seeds = request.seeds or (tuple(range(ROWS)) if len(things) == 1 and not things[0][0] else (0,))
    told = len(seeds) > 1 or not things[0][0]
    return [
        _Subject(f"{title}\nseed {seed}".strip() if told else title, condition, seed)
        for title, condition in things
        for seed in seeds
    ]


def _class_title(source: Source, number: int) -> str:
    return source.classes[number] if source.classes else f"class {number}"


def _lines(prompt: str) -> str:
    """A prompt over a few lines."""
    import textwrap

    return "\n".join(textwrap.wrap(prompt, _PROMPT_LETTERS, max_lines=4, placeholder=" ...") or ["(empty)"])


def _columns(source: Source, request: Request) -> list[_Column]:
    own = (len(source.sampler.times),) if source.few_step else TEACHER_STEPS
    counts = request.steps or own
    if request.teacher_steps and not request.beside_teacher:
        raise UserError("--teacher-steps: acts with --beside-teacher only")
    who = "student, " if request.beside_teacher else ""
    columns = [_Column(f"{who}{_title(count)}", source, source.sampler_in(count)) for count in counts]
    if not request.beside_teacher:
        return columns
    path, scale = _teacher(request.source)
    teacher = open_any(path, scale if request.guidance is None else request.guidance, request.size, request.place)
    if teacher.shape != source.shape:
        raise UserError(
            f"--beside-teacher: {path} makes {teacher.shape}, the student {source.shape}; no noise fits both"
        )
    taught = request.teacher_steps or tuple(dict.fromkeys((*counts, SOLVER_STEPS)))
    return columns + [_Column(f"teacher, {_title(count)}", teacher, teacher.sampler_in(count)) for count in taught]


def _teacher(name: str) -> tuple[str, float]:
    """Path and guidance of the teacher of a run or an export.

    Raises:
        UserError: it has none.
    """
    folder = Path(name)
    config: RunConfig | None = None
    if is_export(folder):
        stated = read_manifest(folder).config
        config = parse(stated) if stated else None
    elif (folder / "config.json").is_file():
        config = read_config(folder)
    if config is None or config.teacher.path is None:
        raise UserError(f"--beside-teacher: {name} is no student of a teacher")
    return config.teacher.path, scale_of(config)


def _title(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"
