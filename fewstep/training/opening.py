"""Where a run starts: its data, its teacher and its student, opened and held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.config import RunConfig
from fewstep.data.cache_fit import told_by
from fewstep.data.sources import Dataset, open_dataset
from fewstep.diffusion.process import same_process
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import load_denoiser, resolve
from fewstep.models.new_network import Shape, new_denoiser
from fewstep.rng import seeded
from fewstep.training.encoding import encoded_by_the_run, unlabelled
from fewstep.training.starting import at_one_scale, open_student, open_teacher, refuse_inputs


@dataclass(frozen=True)
class Sources:
    """Where a run starts.

    Attributes:
        dataset: what it learns from.
        teacher: frozen; None: it learns from the data alone.
        student: with its first weights.
        weak: the model that the teacher is guided by, where that is not the teacher itself.
    """

    dataset: Dataset
    teacher: Denoiser | None
    student: NetworkDenoiser
    weak: Denoiser | None = None


def open_sources(config: RunConfig, device: torch.device | str = "cpu") -> Sources:
    """Data, teacher and student of a run's config.

    Raises:
        UserError: something is missing or does not fit together.
    """
    dataset = open_dataset(config.data.name, size=config.data.size, seed=config.run.seed, split="train",
                           path=config.data.path, options=config.data.options)  # fmt: skip
    teacher = open_teacher(config.teacher, device)
    dataset = encoded_by_the_run(config, dataset, device)
    if teacher is not None:
        teacher = told_by(dataset, teacher, "teacher", _folder(config.teacher.path, device)).sized(dataset.shape)
    student = _first_student(config, teacher, dataset, device)
    student = told_by(dataset, student, "student", _folder(config.student.path, device)).sized(dataset.shape)
    for name, denoiser in (("teacher", teacher), ("student", student)):
        if denoiser is not None:
            _check_fit(name, denoiser, dataset)
    weak = _weak_teacher(config.teacher.weak, teacher, device)
    return Sources(dataset if student.null is not None else unlabelled(dataset), teacher, student, weak)


def _folder(path: str | None, device: torch.device | str) -> Path | None:
    return None if path is None else resolve(path, weights=torch.device(device).type != "meta")


def _weak_teacher(
    path: str | None, teacher: NetworkDenoiser | None, device: torch.device | str
) -> NetworkDenoiser | None:
    if path is None or teacher is None:
        return None
    weak = load_denoiser(path, device, "teacher.weak")
    refuse_inputs(weak, f"teacher.weak: {path}")
    if not same_process(weak.process, teacher.process):
        raise UserError(f"teacher.weak: the noise schedule of {path} is another than the teacher's; they must agree")
    for what, (its, ours) in {
        "classes": (_classes(weak), _classes(teacher)),
        "channels": (_channels(weak), _channels(teacher)),
    }.items():
        if its != ours:
            raise UserError(f"teacher.weak: {path} has {its or 'no'} {what}, the teacher {ours or 'none'}; "
                            "they must agree")  # fmt: skip
    return weak


def _classes(denoiser: NetworkDenoiser) -> int:
    return 0 if denoiser.null is None or denoiser.null.labels is None else int(denoiser.null.labels)


def _channels(denoiser: NetworkDenoiser) -> int | None:
    return getattr(denoiser.network, "config", {}).get("in_channels")


def _first_student(
    config: RunConfig, teacher: NetworkDenoiser | None, dataset: Dataset, device: torch.device | str
) -> NetworkDenoiser:
    if config.student.new is not None:
        channels, side = dataset.shape[0], dataset.shape[-1]
        shape = Shape(channels, side, len(dataset.classes))
        return new_denoiser(config.student.new, shape, config.run.seed).to(device)
    if config.student.path is not None:
        return open_student(config.student.path, teacher, config.teacher, device)
    if teacher is None:
        raise UserError("teacher.path: missing; give a teacher, or student.new for a network from scratch")
    if config.student.lora is None:
        return at_one_scale(teacher.copy(), config.teacher)
    teacher.adapters.convolutions = config.student.lora_convolutions
    with seeded(config.run.seed):
        return at_one_scale(teacher.lora_view("student", config.student.lora), config.teacher)


def _check_fit(name: str, denoiser: NetworkDenoiser, dataset: Dataset) -> None:
    channels = _channels(denoiser)
    held = dataset.shape[-1 if denoiser.family.packed else 1 if denoiser.family.frames == 1 else 0]
    if channels is not None and channels != held:
        raise UserError(f"data.name: samples have {held} channels, the {name} takes {channels}")
    if denoiser.null is None or denoiser.null.labels is None:
        return
    classes = int(denoiser.null.labels)
    if len(dataset.classes) != classes:
        raise UserError(
            f"data.name: {len(dataset.classes)} classes in the data, {classes} in the {name}; they must agree"
        )
