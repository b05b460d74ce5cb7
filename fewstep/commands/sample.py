"""`fewstep sample`: a grid of pictures, one row a step count, the same noise in one column."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from fewstep.commands.source import Source, open_source
from fewstep.evaluation.grid import save_grid

COLUMNS = 8
TEACHER_STEPS = (1, 2, 4, 32)


def run(name: str, out: Path, steps: Sequence[int], classes: Sequence[str], seed: int, guidance: float | None) -> None:
    """Write the grid and print what each row costs."""
    source = open_source(name, guidance)
    numbers = [source.class_number(word) for word in classes] or list(range(min(COLUMNS, source.class_count)))
    counts = list(steps) or ([len(source.sampler.times)] if source.few_step else list(TEACHER_STEPS))
    samplers = [source.sampler_in(count) for count in counts]
    labels = torch.tensor(numbers) if numbers else None
    noise = torch.randn(len(numbers) or COLUMNS, *source.shape, generator=torch.Generator().manual_seed(seed))
    rows = []
    for sampler in samplers:
        clock = time.perf_counter()
        rows.append(source.images(sampler, noise, labels, seed + 1))
        seconds = (time.perf_counter() - clock) / len(noise)
        typer.echo(f"{_title(len(sampler.times))}: {seconds:.3g} s/image")
    save_grid(out, rows, [_title(count) for count in counts], [_class_title(source, n) for n in numbers])
    typer.echo(f"wrote {out}")


def _title(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _class_title(source: Source, number: int) -> str:
    return source.classes[number] if source.classes else str(number)
