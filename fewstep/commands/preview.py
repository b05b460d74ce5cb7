"""Samples of a run on latents, as a picture: what they are asked for, and the VAE that shows them."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.commands.ends import pipeline_of
from fewstep.commands.watch import undisturbed
from fewstep.data.cached import CachedLatents
from fewstep.data.encoding import Encoded
from fewstep.diffusion.solvers import sample
from fewstep.errors import UserError
from fewstep.evaluation.grid import save_grid
from fewstep.models.conditioning import Condition
from fewstep.models.encoder import Encoder, open_encoder
from fewstep.models.guidance_input import at_scale
from fewstep.training.assemble import EMA
from fewstep.training.encoding import encoded_set
from fewstep.training.finished import sampler_of
from fewstep.training.loop import TrainState

ROWS, COLUMNS = 4, 4
_LETTERS = 24  # of a row's title, a line


@dataclass(frozen=True, eq=False)
class Preview:
    """A row for each prompt or class, a column for each noise. One sample is made and decoded at a time.

    Attributes:
        condition: of the rows.
        titles: one a row.
        encoder: with the VAE; in the main process, and where the run encodes its data, in all.
    """

    condition: Condition
    titles: tuple[str, ...]
    encoder: Encoder | None

    @staticmethod
    def of(state: TrainState) -> Preview | None:
        """Of a run; None where it makes no grids, or none of latents.

        Raises:
            UserError: there is no VAE to show its samples or no text encoder for its prompts, or a setting does
                nothing in this run.
        """
        config, data = state.config, encoded_set(state.loader.dataset)
        if config.train.sample_prompts and (data is None or data.null is None):
            raise UserError("train.sample_prompts: given, but the run's student takes no prompts; leave it out")
        shown = config.train.sample_every or config.evaluate.every
        idle = data is None or (isinstance(data, CachedLatents) and not shown)
        if config.memory.encoders == "host" and idle:
            raise UserError("memory.encoders: host given, but this run encodes and decodes nothing; leave it out")
        if data is None or not config.train.sample_every:
            return None
        with undisturbed(config):
            condition, titles = _rows(state, data)
            return Preview(condition.to(state.accelerator.device), titles, _vae(state, data))

    def write(self, state: TrainState, path: Path) -> None:
        """Write samples of the averaged student as a PNG; the run's streams are untouched.

        Every process computes them, for a network may be spread over all; the main one writes.
        """
        with undisturbed(state.config):
            with state.method.averages[EMA].swapped(), state.accelerator.autocast():
                made = [self._latents(state, row) for row in range(len(self.titles))]
            if not state.accelerator.is_main_process:
                return
            assert self.encoder is not None
            rows = [torch.cat([self.encoder.images(one).float().cpu() for one in row]) for row in made]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, rows, self.titles, scale=max(1, min(3, 96 // rows[0].shape[-1])))

    def _latents(self, state: TrainState, row: int) -> list[Tensor]:
        """A row's samples `(1, *)`."""
        student, seed, device = state.method.student, state.config.run.seed, state.accelerator.device
        sampler, told = sampler_of(state.config, student.process), self.condition.rows(slice(row, row + 1))
        made = []
        for column in range(COLUMNS):
            noise = torch.randn(1, *state.loader.dataset.shape, generator=torch.Generator().manual_seed(seed + column))
            fresh = torch.Generator(device).manual_seed(seed + column)
            made.append(sample(at_scale(student), sampler, noise.to(device), told, fresh))
        return made


def _rows(state: TrainState, data: CachedLatents | Encoded) -> tuple[Condition, tuple[str, ...]]:
    """What each row is asked for, and its title: prompts, the first captions of the data, or its first classes."""
    config, student = state.config, state.method.student
    if student.null is None:
        return Condition.none(), ("",) * ROWS
    if student.null.labels is not None:
        labels = torch.arange(min(ROWS, int(student.null.labels)))
        return Condition.of_labels(labels), tuple(data.classes[i] if data.classes else f"class {i}" for i in labels)
    first = range(ROWS if data.length is None else min(ROWS, data.length))
    prompts: Sequence[str] | None = config.train.sample_prompts
    if not prompts and isinstance(data, Encoded):
        prompts = data.pixels.batch(first).captions
    if not prompts:
        assert isinstance(data, CachedLatents)
        condition = data.batch(first).condition
        assert condition is not None
        return condition, ("",) * len(first)
    return _told(state, data, prompts), tuple(map(_lines, prompts))


def _told(state: TrainState, data: CachedLatents | Encoded, prompts: Sequence[str]) -> Condition:
    """The conditions of prompts; text encoders that the run has no other use for are gone afterwards."""
    if isinstance(data, Encoded):
        return data.told(prompts)
    config, device = state.config, state.accelerator.device
    path, side, rest = pipeline_of(config, data), data.index.plan.size, config.memory.encoders == "host"
    try:
        told = open_encoder(path, device, side=side, rest=rest).prompts(prompts)
        gc.collect()  # modules that rest and their hooks refer to each other, and would stay for long
        return told
    except UserError as error:
        raise UserError(f"train.sample_prompts: {error}") from error


def _vae(state: TrainState, data: CachedLatents | Encoded) -> Encoder | None:
    if isinstance(data, Encoded):
        assert isinstance(data.encoder, Encoder)
        return data.encoder
    if not state.accelerator.is_main_process:
        return None
    config = state.config
    every, path = config.train.sample_every, pipeline_of(config, data)
    try:
        encoder = open_encoder(path, state.accelerator.device, rest=config.memory.encoders == "host", parts="vae")
        shape = encoder.latent_shape(data.index.plan.size)
    except UserError as error:
        raise UserError(f"train.sample_every: {every} given, but nothing shows the run's latents ({error}); "
                        "set it to 0") from error  # fmt: skip
    if shape != tuple(data.shape):
        raise UserError(f"train.sample_every: {every} given, but the VAE in {path} makes latents of shape {shape}, the "
                        f"cache holds {tuple(data.shape)}; set it to 0")  # fmt: skip
    return encoder


def _lines(prompt: str) -> str:
    """A prompt over a few lines."""
    return "\n".join(textwrap.wrap(prompt, _LETTERS, max_lines=4, placeholder=" ...") or ["(empty)"])
