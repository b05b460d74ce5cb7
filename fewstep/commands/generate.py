"""Generated images, each a function of the seed and of its position, whatever batch or process makes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.commands.shards import shards
from fewstep.commands.source import Source
from fewstep.commands.wanted import Wanted, wanted
from fewstep.data.counter import uniforms
from fewstep.diffusion.solvers import Sampler
from fewstep.evaluation.features import to_uint8
from fewstep.models.conditioning import Condition

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """Images `(N, C, H, W)`, in about [-1, 1] or uint8, what they were asked for, and the time one took."""

    images: Tensor
    wanted: Wanted
    seconds_per_image: float


class Clock:
    """Seconds that images took."""

    def __init__(self) -> None:
        self._seconds, self._images = 0.0, 0

    @property
    def per_image(self) -> float | None:
        """Seconds an image; None without images."""
        return self._seconds / self._images if self._images else None

    def timing(self, images: int) -> Clock:
        """A `with` block in which that many are made."""
        self._images += images
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start


def make_images(
    source: Source, sampler: Sampler, count: int, batch: int, seed: int, prompts: Sequence[str] | None = None
) -> Made:
    """`count` images, classes or prompts in turn. Image i is a function of the seed and of i, in whatever batch."""
    asked, clock = wanted(source, count, prompts), Clock()
    with clock.timing(count):
        parts = [make_shard(source, sampler, rows, asked, batch, seed) for rows in tracked(shards(count), True)]
    return Made(torch.cat(parts), asked, clock.per_image or 0.0)


def make_shard(source: Source, sampler: Sampler, rows: range, asked: Wanted, batch: int, seed: int) -> Tensor:
    """The images `(N, C, H, W)` at the positions `rows`, of what is asked for at all positions.

    Those of latents are uint8 already, for they are many times as large.
    """
    parts = []
    for part in _batches(rows, batch):
        made = _sample(source, sampler, part, asked.at(part).told(source), seed)
        parts.append(made if source.encoder is None else to_uint8(made))
    return torch.cat(parts)


def _batches(rows: range, batch: int) -> Iterator[range]:
    return (range(start, min(start + batch, rows.stop)) for start in range(rows.start, rows.stop, batch))


def tracked(parts: Sequence[T], shown: bool) -> Iterator[T]:
    """`parts`, with a progress bar where it may be shown and somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(parts, "sampling", console=console, transient=True, disable=not (shown and console.is_terminal))


@torch.no_grad()
def _sample(source: Source, sampler: Sampler, rows: range, condition: Condition, seed: int) -> Tensor:
    """As the sampler does, with fresh noise that belongs to the sample instead of to the batch."""
    noise = sample_noise(source.shape, rows, seed, 0)
    if sampler.kind != "renoise":
        return source.images(sampler, noise, condition, seed)
    process = source.denoiser.process
    x = process.prior(noise, sampler.times[0])
    x0 = source.denoiser(x, process.times(sampler.times[0], x), condition).x0
    for step, time_ in enumerate(sampler.times[1:], 1):
        t = process.times(time_, x0)
        x = process.add_noise(x0, sample_noise(source.shape, rows, seed, step), t)
        x0 = source.denoiser(x, t, condition).x0
    return source.shown(x0)


def sample_noise(shape: tuple[int, ...], rows: range, seed: int, step: int) -> Tensor:
    """Unit noise `(B, *shape)` float32 of the samples `rows` before a step: a function of seed, sample and step."""
    size = int(np.prod(shape))
    index = np.arange(rows.start * size, rows.stop * size, dtype=np.uint64)
    u = torch.from_numpy(uniforms(seed, f"evaluation noise {step}", index)).clamp_min(2.0**-54)
    return torch.special.ndtri(u).float().view(len(rows), *shape)
