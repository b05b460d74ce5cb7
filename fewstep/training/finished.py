"""A run that has been trained, opened for sampling and export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep import registry
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training import checkpoint
from fewstep.training.assemble import EMA, build_method
from fewstep.training.opening import open_sources

SOLVER_STEPS = 32  # of a network that is no few-step student


@dataclass(frozen=True)
class Finished:
    """What a run leaves.

    Attributes:
        config: the resolved run.
        student: with the averaged weights of the last checkpoint.
        sampler: how it makes samples.
        step: of that checkpoint.
        classes: names of the data's classes by number.
        few_step: whether the student was made for that sampler's number of steps; a teacher was not.
    """

    config: RunConfig
    student: NetworkDenoiser
    sampler: Sampler
    step: int
    classes: tuple[str, ...]
    few_step: bool


def load_run(folder: Path, device: torch.device | str = "cpu") -> Finished:
    """The averaged student of a run's last checkpoint.

    Args:
        folder: the run's folder, wherever it lies now.
        device: where the student computes.

    Raises:
        UserError: the folder is no run, has no checkpoint yet, or its data, teacher or checkpoint cannot be read.
    """
    config = read_config(folder)
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: no checkpoint yet; it appears after train.checkpoint_every steps")
    sources = open_sources(config, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        method = build_method(config, sources)
    average = method.averages[EMA]
    checkpoint.load_average(found[-1], EMA, average)
    for name, parameter in average.source.parameters.items():
        parameter.data = average.shadow[name].to(parameter.dtype)
    step = int(found[-1].name.rpartition("-")[2])
    sampler = sampler_of(config, method.student.process)
    return Finished(config, method.student, sampler, step, tuple(sources.dataset.classes), method.few_step)


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json; the folder of a run is needed, as run.dir names it") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def sampler_of(config: RunConfig, process: Process) -> Sampler:
    """The sampler of the run's student, in `student.steps` steps; a teacher takes 32."""
    cls = registry.get(config.method.name)
    return cls.sampler(config.method, process, config.student.steps if cls.few_step else SOLVER_STEPS)
