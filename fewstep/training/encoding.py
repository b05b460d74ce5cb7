"""Whether a run encodes its pictures and captions itself, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.config import RunConfig
from fewstep.data.cache_fit import takes_prompts
from fewstep.data.cached import CachedLatents
from fewstep.data.encoding import Encoded
from fewstep.data.prompts import PromptList
from fewstep.data.samples import Dataset, Unlabelled
from fewstep.errors import UserError
from fewstep.models.encoder import open_encoder
from fewstep.models.load import network_class, network_component, pipeline_folder, read_json, resolve


def encoded_by_the_run(config: RunConfig, dataset: Dataset, device: torch.device | str) -> Dataset:
    """The set as the run's networks take it: encoded by their pipeline where they are told prompts or see latents.

    Args:
        config: the run's.
        dataset: as its config names it.
        device: of the run; on the meta device, which has no values, the host encodes.

    Raises:
        UserError: text encoders or VAE are missing, or do not go with the set, or nothing can be drawn.
    """
    path, nowhere = config.teacher.path or config.student.path, torch.device(device).type == "meta"
    place = "teacher.path" if config.teacher.path else "student.path"
    folder = None if path is None else pipeline_folder(resolve(path, place, weights=not nowhere))
    if path is None or folder is None or not _is_due(_network(folder), dataset, folder):
        _refuse_idle_draws(config, dataset)
        return dataset
    whole, there, prompts = str(pipeline_folder(resolve(path, place))), "cpu" if nowhere else device, _is_told(folder)
    encoder = open_encoder(whole, there, side=dataset.shape[-1], rest=config.memory.encoders == "host",
                           parts="all" if prompts else "vae")  # fmt: skip
    draws = config.run.seed if config.data.latents == "drawn" else None
    at_once = config.data.batch_size // config.train.accumulate
    try:
        made = Encoded.of(dataset, encoder, prompts, draws, at_once)
    except UserError as error:
        raise UserError(str(error).replace("side:", "data.size:", 1)) from error
    _refuse_idle_draws(config, made)
    if draws is not None and not encoder.has_posterior:
        raise UserError(f"data.latents: drawn given, but the VAE in {path} has one latent for an image, and no "
                        "posterior to draw from; leave it out")  # fmt: skip
    return made


def encoded_set(dataset: Dataset) -> CachedLatents | Encoded | None:
    """The set of latents that a run learns from; None where it learns from something else."""
    inner = dataset.dataset if isinstance(dataset, Unlabelled) else dataset
    return inner if isinstance(inner, CachedLatents | Encoded) else None


def unlabelled(dataset: Dataset) -> Dataset:
    """The set without its labels, for an unconditional network."""
    return dataset.unlabelled() if isinstance(dataset, Encoded) else Unlabelled(dataset)


def _network(folder: Path) -> Mapping[str, Any]:
    return read_json(folder / network_component(folder) / "config.json")


def _is_told(folder: Path) -> bool:
    """Whether the pipeline's network takes prompts."""
    return takes_prompts(network_class(_network(folder)))


def _is_due(network: Mapping[str, Any], dataset: Dataset, folder: Path) -> bool:
    """Not for a cache, and not for sets that the network cannot learn from, encoded or not."""
    if isinstance(dataset, CachedLatents) or len(dataset.shape) != 3 or dataset.shape[0] != 3:
        return False
    if _is_told(folder):
        return dataset.batch([0]).captions is not None
    return network.get("in_channels") not in (None, 3) and (folder / "vae").is_dir()


def _refuse_idle_draws(config: RunConfig, dataset: Dataset) -> None:
    encodes = isinstance(dataset, Encoded) and not isinstance(dataset.pixels, PromptList)
    if config.data.latents == "drawn" and not encodes:
        raise UserError(f"data.latents: drawn given, but a run of this teacher on data.name={config.data.name} encodes "
                        "no pictures; leave it out")  # fmt: skip
