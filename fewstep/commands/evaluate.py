"""`fewstep evaluate`: how far a source's samples are from real ones, in figures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from fewstep.commands.json_file import require_writable, write_json
from fewstep.commands.source import Source, open_source
from fewstep.data.counter import uniforms
from fewstep.data.samples import Dataset, ImageSet
from fewstep.data.sources import open_dataset
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import Extractor
from fewstep.evaluation.images import Reference, Scores, reference, score_images
from fewstep.models.conditioning import Condition


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        source: a run's folder, an export, or a teacher.
        reference: a data set's name, or a folder of images.
        features: the feature network's name.
        samples: images on each side.
        steps: of the sampler; None: its own number.
        guidance: of a teacher; None: off, or what its folder states.
        batch_size: images made at a time.
        seed: of the noise and of the real samples.
    """

    source: str
    reference: str
    features: str
    samples: int
    steps: int | None
    guidance: float | None
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Made:
    """Images `(N, C, H, W)`, the classes `(N,)` asked for, and the time one took."""

    images: Tensor
    labels: Tensor | None
    seconds_per_image: float


def run(request: Request, out: Path | None) -> None:
    """Measure, print the figures, and write them to `out`."""
    require_writable("--json", out)
    sampler, scores = evaluate(request)
    facts = {"source": request.source, "steps": len(sampler.times), "sampler": sampler.kind,
             "reference": request.reference, "seed": request.seed, "guidance": request.guidance}  # fmt: skip
    figures = {**facts, **scores.as_json()}
    for key, value in figures.items():
        typer.echo(f"{key:<18}{value:.5g}" if isinstance(value, float) else f"{key:<18}{_told(value)}")
    if out is not None:
        write_json(out, figures)


def evaluate(request: Request) -> tuple[Sampler, Scores]:
    """The scores of a source, and how it was sampled.

    Raises:
        UserError: a name is not known, or source, reference and features do not fit together.
    """
    source = open_source(request.source, request.guidance)
    sampler = source.sampler if request.steps is None else source.sampler_in(request.steps)
    made = make_images(source, sampler, request.samples, request.batch_size, request.seed)
    return sampler, Judge.of(request, source)(made)


@dataclass(frozen=True)
class Judge:
    """A feature network with the features of the real set: made once, for any number of sources."""

    extractor: Extractor
    real: Reference

    @staticmethod
    def of(request: Request, source: Source) -> Judge:
        """For sources such as `source`.

        Raises:
            UserError: the reference or the features are not known, or do not fit the source.
        """
        network = extractor(request.features)
        return Judge(network, reference(_real(request, source), request.samples, request.seed, network))

    def __call__(self, made: Made) -> Scores:
        """The scores of what was made."""
        return score_images(made.images, made.labels, self.real, self.extractor, made.seconds_per_image)


def _real(request: Request, source: Source) -> ImageSet:
    """The real set, in the source's size."""
    folder = Path(request.reference) if Path(request.reference).is_dir() else None
    name, size = ("folder", source.shape[-1]) if folder else (request.reference, None)
    try:
        dataset = open_dataset(name, seed=request.seed, size=size, path=folder)
    except UserError as error:
        raise UserError(f"--reference: {error}") from error
    _check_fit(request.reference, dataset, source)
    return dataset  # pyright: ignore[reportReturnType] - its shape was checked


def _check_fit(name: str, dataset: Dataset, source: Source) -> None:
    if dataset.shape != source.shape:
        raise UserError(f"--reference: {name} has images of shape {dataset.shape}, the source makes {source.shape}")
    count = len(dataset.classes)
    if source.class_count and count and count != source.class_count:
        raise UserError(f"--reference: {name} has {count} classes, the source {source.class_count}; they must agree")


@torch.no_grad()
def make_images(source: Source, sampler: Sampler, count: int, batch: int, seed: int) -> Made:
    """`count` images, classes in turn. Image i is a function of the seed and of i, in whatever batch it is made."""
    from rich.console import Console
    from rich.progress import track

    labels = torch.arange(count) % source.class_count if source.class_count else None
    clock, parts = time.perf_counter(), []
    console = Console(stderr=True)
    starts = track(range(0, count, batch), "sampling", console=console, transient=True, disable=not console.is_terminal)
    for start in starts:
        rows = range(start, min(start + batch, count))
        condition = Condition.none() if labels is None else Condition.of_labels(labels[rows.start : rows.stop])
        parts.append(_sample(source, sampler, rows, condition, seed))
    return Made(torch.cat(parts), labels, (time.perf_counter() - clock) / count)


def _sample(source: Source, sampler: Sampler, rows: range, condition: Condition, seed: int) -> Tensor:
    """As the sampler does, with fresh noise that belongs to the sample instead of to the batch."""
    noise = sample_noise(source.shape, rows, seed, 0)
    if sampler.kind != "renoise":
        return source.images(sampler, noise, condition.labels, seed)
    process = source.denoiser.process
    x = process.prior(noise, sampler.times[0])
    x0 = source.denoiser(x, process.times(sampler.times[0], x), condition).x0
    for step, time_ in enumerate(sampler.times[1:], 1):
        t = process.times(time_, x0)
        x = process.add_noise(x0, sample_noise(source.shape, rows, seed, step), t)
        x0 = source.denoiser(x, t, condition).x0
    return x0


def sample_noise(shape: tuple[int, ...], rows: range, seed: int, step: int) -> Tensor:
    """Unit noise `(B, *shape)` float32 of the samples `rows` before a step: a function of seed, sample and step."""
    size = int(np.prod(shape))
    index = np.arange(rows.start * size, rows.stop * size, dtype=np.uint64)
    u = torch.from_numpy(uniforms(seed, f"evaluation noise {step}", index)).clamp_min(2.0**-54)
    return torch.special.ndtri(u).float().view(len(rows), *shape)


def _told(value: object) -> object:
    return "-" if value is None else value
