"""`fewstep pairs`: what the guided teacher of a run makes of known noise, stored for regression losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from fewstep.commands.configs import find
from fewstep.config_file import load
from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.training.assemble import guided_teacher
from fewstep.training.opening import open_sources


@dataclass(frozen=True)
class _Job:
    teacher: Guided
    sampler: Sampler
    noise: Tensor
    condition: Condition


def run(path: Path, out: Path, overrides: Sequence[str], count: int, solver_steps: int, batch: int, seed: int) -> None:
    """Write `count` pairs, made by DDIM in `solver_steps` steps, `batch` at a time."""
    from rich.console import Console
    from rich.progress import Progress

    config = load(find(path), overrides)
    sources = open_sources(config)
    teacher = sources.teacher
    if not isinstance(teacher, NetworkDenoiser):
        raise UserError("teacher.path: missing; pairs are made by a teacher")
    guided = guided_teacher(config.teacher, sources)
    assert guided is not None
    job = _job(guided, Sampler.of(teacher.process, solver_steps, "ddim"), count, sources.dataset.shape, seed)
    made = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress, torch.no_grad():
        for rows in progress.track([slice(i, i + batch) for i in range(0, count, batch)], description="pairs"):
            made.append(sample(job.teacher, job.sampler, job.noise[rows], job.condition.rows(rows)))
    save_pairs(out, Pair(job.noise, torch.cat(made), job.condition))
    typer.echo(f"wrote {count} pairs to {out}")


def _job(guided: Guided, sampler: Sampler, count: int, shape: tuple[int, ...], seed: int) -> _Job:
    """All noise and labels at once, so that pairs do not depend on the batch; labels are uniform over the classes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)
    null = guided.null
    if null is None or null.labels is None:
        return _Job(guided, sampler, noise, Condition.none())
    labels = torch.randint(int(null.labels), (count,), generator=generator)
    return _Job(guided, sampler, noise, Condition.of_labels(labels))
