"""`fewstep demo`, the main job: two students of the embedded teacher, compared in pictures and figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from fewstep import __version__
from fewstep.commands.configs import find
from fewstep.commands.json_file import write_json
from fewstep.commands.train import logged, start
from fewstep.config_file import load
from fewstep.data.emoji import emoji32
from fewstep.diffusion.solvers import Denoiser, Sampler, sample
from fewstep.errors import UserError
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import Extractor
from fewstep.evaluation.grid import save_grid
from fewstep.evaluation.images import Reference, Scores, reference, score_images
from fewstep.models.conditioning import Condition
from fewstep.models.load import load_denoiser
from fewstep.pipelines.export import export_run
from fewstep.training.assemble import EMA
from fewstep.training.loop import TrainState

TEACHER = "emoji32"
TEACHER_STEPS = (1, 2, 4, 32)
SHOWN = ("strawberry", "watermelon slice", "pizza slice", "mushroom", "cat face", "panda face", "frog face",
         "octopus", "cactus", "soccer ball", "red car", "rocket", "gift box", "yellow star")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much the demo does: a student's steps, and images scored on each side."""

    share_of_steps: float
    images: int
    real_images: int


FULL, QUICK = Size(1.0, 300, 1000), Size(0.03, 48, 100)


@dataclass(frozen=True)
class Made:
    """Images `(N, 3, 32, 32)` of one sampler, and the time one took."""

    images: Tensor
    seconds_per_image: float


@dataclass(frozen=True)
class Start:
    """The same start for every sampler: noise `(N, 3, 32, 32)`, labels `(N,)`, and the seed of what is drawn later."""

    noise: Tensor
    labels: Tensor
    seed: int


def run(out: Path, seed: int, quick: bool) -> None:
    """Distil, export, sample, score and draw into `out`."""
    clock, size = time.perf_counter(), QUICK if quick else FULL
    _writable(out)
    students = {"consistency": _distil("consistency", out, seed, size)}
    students["dmd2"] = _distil("dmd2", out, seed, size, [f"student.path={students['consistency'].export}"])
    typer.echo("sampling teacher and students from the same noise")
    begin = _start(size.images, seed)
    teacher = load_denoiser(TEACHER)
    taught = {steps: _make(teacher, Sampler.of(teacher.process, steps, "ddim"), begin) for steps in TEACHER_STEPS}
    learnt = {name: _make_student(students[name].state, begin) for name in ("dmd2", "consistency")}
    scoring = _Scoring(size, seed)
    report = {
        "teacher": {str(steps): scoring(made, begin) for steps, made in taught.items()},
        "students": {name: {str(students[name].steps): scoring(learnt[name], begin)} for name in learnt},
        "seconds": round(time.perf_counter() - clock, 1),
        "seed": seed,
        "quick": quick,
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")} | {"fewstep": __version__},
    }
    _picture(out / "grid.png", taught, {_title(name, students[name].steps, quick): learnt[name] for name in learnt})
    write_json(out / "report.json", report)
    _tell(out, report, students["dmd2"].export)


@dataclass(frozen=True)
class Distilled:
    """A trained student, and the pipeline folder it left as."""

    state: TrainState
    export: Path

    @property
    def steps(self) -> int:
        """Its network evaluations per sample."""
        return self.state.config.student.steps


def _distil(name: str, out: Path, seed: int, size: Size, overrides: Sequence[str] = ()) -> Distilled:
    """Train and export one student, going on where an interrupted demo stopped."""
    path = find(Path(f"demo/{name}"))
    steps = max(6, round(load(path, overrides).train.steps * size.share_of_steps))
    folder = out / "runs" / f"{name}-seed{seed}{'' if size is FULL else '-quick'}"
    config = load(path, [f"run.dir={folder}", f"run.seed={seed}", f"train.steps={steps}", *overrides])
    typer.echo(f"{name}: distilling a {config.student.steps}-step student, {steps} optimizer steps")
    state = start(config)
    for _ in logged(state):
        pass
    export = out / "export" / name
    difference = export_run(folder, export)
    typer.echo(f"{export}: reloaded without fewstep, samples differ by at most {difference:.1e}")
    return Distilled(state, export)


def _start(images: int, seed: int) -> Start:
    generator = torch.Generator().manual_seed(seed)
    shape = emoji32().shape
    return Start(torch.randn(images, *shape, generator=generator), torch.arange(images) % len(emoji32().classes), seed)


def _make_student(state: TrainState, begin: Start) -> Made:
    config, student = state.config, state.method.student
    with state.method.averages[EMA].swapped():
        return _make(student, state.method.sampler(config.method, student.process, config.student.steps), begin)


@torch.no_grad()
def _make(denoiser: Denoiser, sampler: Sampler, begin: Start, chunk: int = 100) -> Made:
    clock, parts = time.perf_counter(), []
    generator = torch.Generator().manual_seed(begin.seed + 1)
    for noise, labels in zip(begin.noise.split(chunk), begin.labels.split(chunk), strict=True):
        parts.append(sample(denoiser, sampler, noise, Condition.of_labels(labels), generator))
    return Made(torch.cat(parts), (time.perf_counter() - clock) / len(begin.noise))


class _Scoring:
    """Scores on the shipped classifier's features, and on EfficientNet-Lite0's where it is installed."""

    def __init__(self, size: Size, seed: int) -> None:
        self._judges: dict[str, tuple[Extractor, Reference]] = {}
        for name in ("classifier", "efficientnet-lite0"):
            try:
                network = extractor(name)
            except UserError:
                if name == "classifier":
                    raise
                continue
            self._judges[name] = network, reference(emoji32(), size.real_images, seed, network)

    def __call__(self, made: Made, begin: Start) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, (network, real) in self._judges.items():
            scores: Scores = score_images(made.images, begin.labels, real, network, made.seconds_per_image)
            out |= (
                scores.as_json() if name == "classifier" else {name: {"fd": scores.fd.value, "kid": scores.kid.value}}
            )
        return out


def _picture(path: Path, taught: Mapping[int, Made], learnt: Mapping[str, Made]) -> None:
    """One row a sampler, one column a class, the same noise in each column."""
    classes = emoji32().classes
    chosen = [classes.index(name) for name in SHOWN]
    rows = {f"teacher, {steps} step{'s' * (steps > 1)}": made for steps, made in taught.items()} | dict(learnt)
    columns = [classes[i].replace(" ", "\n") for i in chosen]
    save_grid(path, [made.images[chosen] for made in rows.values()], list(rows), columns)


def _title(name: str, steps: int, quick: bool) -> str:
    return f"{name}, {steps} step{'s' * (steps > 1)}" + ("\nquick run: not trained to its end" if quick else "")


def _tell(out: Path, report: Mapping[str, Any], export: Path) -> None:
    typer.echo(f"\n{'':<24}{'FD':>8}{'KID':>9}{'accuracy':>10}")
    rows = {f"teacher {steps} steps": scores for steps, scores in report["teacher"].items()}
    for name, by_steps in report["students"].items():
        rows |= {f"{name} {steps} steps": scores for steps, scores in by_steps.items()}
    for title, scores in rows.items():
        typer.echo(f"{title:<24}{scores['fd']:>8.2f}{scores['kid']:>9.4f}{scores['accuracy']:>10.3f}")
    if report["quick"]:
        typer.echo("a quick run: too short for good students; run without --quick for the real figures")
    typer.echo(f"\n{out / 'grid.png'}, {out / 'report.json'}, {report['seconds']:.0f} s. In plain diffusers:")
    typer.echo(f'  pipe = diffusers.DiffusionPipeline.from_pretrained("{export}")')
    typer.echo("  pipe(class_labels=[3], num_inference_steps=1).images[0]")


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
