"""Samples of a run in training, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.solvers import sample
from fewstep.evaluation.grid import save_grid
from fewstep.models.conditioning import Condition
from fewstep.models.guidance_input import at_scale
from fewstep.training.assemble import EMA
from fewstep.training.finished import sampler_of
from fewstep.training.loop import TrainState

COLUMNS = 8


def health_sheet(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write what a panel saw, a row for each thing and noise rising from left to right, as a PNG of some columns."""
    shown = [row[:: max(1, len(row) // COLUMNS)][:COLUMNS].float().cpu() for row in rows.values()]
    if shown[0].shape[1] in (1, 3):  # latents are no pictures
        save_grid(path, shown, list(rows), scale=2 if shown[0].shape[-1] <= 64 else 1)


@torch.no_grad()
def sample_grid(state: TrainState, path: Path, rows: int = 4) -> None:
    """Write `rows` × 8 samples of the averaged student, from noise of its own seed: the run's stream is untouched.

    Every process computes them, for a network may be spread over all; the main one writes.
    """
    student, config = state.method.student, state.config
    sampler = sampler_of(config, student.process)
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (rows * COLUMNS, *state.loader.dataset.shape)
    noise = torch.randn(shape, generator=generator).to(state.accelerator.device)
    condition = Condition.none()
    if student.null is not None and student.null.labels is not None:
        count = int(student.null.labels)
        condition = Condition.of_labels((torch.arange(len(noise)) % count).to(noise.device))
    with state.method.averages[EMA].swapped(), state.accelerator.autocast():
        fresh = torch.Generator(noise.device).manual_seed(config.run.seed)
        images = sample(at_scale(student), sampler, noise, condition, fresh)
    if not state.accelerator.is_main_process:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path, list(images.float().cpu().chunk(rows)), [""] * rows, [""] * COLUMNS)
