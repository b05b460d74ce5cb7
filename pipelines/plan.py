"""Everything about an export that is decided before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import GUIDANCE, middle
from fewstep.models.lora import BASE
from fewstep.models.schedule import Schedule

from .networks import class_of
from .pixel_vae import PixelVAE
from .recipes import Recipe, recipe_of
from .schedulers import Contract, contract_of, own_contract_of

_INDEX = "model_index.json"


@dataclass(frozen=True)
class Form:
    """What the user may choose of an export.

    Attributes:
        dtype: of the weights in the files.
        max_shard_size: of a file of the network's weights, as "5GB".
        lora: a file of adapters for the teacher's pipeline, in place of a pipeline folder.
    """

    dtype: torch.dtype = torch.float32
    max_shard_size: str = "10GB"
    lora: bool = False


@dataclass(frozen=True)
class Plan:
    """How a student leaves.

    Attributes:
        recipe: its pipeline.
        contract: its scheduler, and the steps.
        call: the pipeline's arguments.
        teacher_folder: the teacher's pipeline folder, or None.
        teacher_index: what that folder's `model_index.json` says.
    """

    recipe: Recipe
    contract: Contract
    call: Mapping[str, Any]
    teacher_folder: Path | None
    teacher_index: Mapping[str, Any]

    @property
    def scheduler(self) -> type:
        """The scheduler's class."""
        return type(self.contract.scheduler)


def plan_of(student: NetworkDenoiser, sampler: Sampler, teacher_folder: Path | None, form: Form) -> Plan:
    """The plan of a student.

    Raises:
        UserError: no scheduler or pipeline can run it, or not in that form.
    """
    index = _read(teacher_folder / _INDEX) if teacher_folder else {}
    recipe = recipe_of(student, index.get("_class_name"))
    config = _read(teacher_folder / "scheduler" / "scheduler_config.json") if teacher_folder else {}
    schedule = Schedule(student.process, student.kind, student.preconditioning)
    contract = contract_of(schedule, sampler, config)
    if not recipe.serves(contract):
        contract = own_contract_of(schedule, sampler, config)
    if form.lora:
        _refuse_lora(student, recipe)
    return Plan(recipe, contract, {**recipe.call(contract), **_scale(student)}, teacher_folder, index)


def own_classes(student: NetworkDenoiser, plan: Plan) -> tuple[str, ...]:
    """The classes of fewstep that the export names, with their modules."""
    network = (class_of(type(student.network).__name__),) if student.graft.names else ()
    scheduler = (plan.scheduler,) if plan.contract.own else ()
    pixels = (PixelVAE,) if plan.recipe.pixels else ()
    replaced = (student.family.component, "scheduler")
    parts = [entry for name, entry in plan.teacher_index.items() if isinstance(entry, list) and name not in replaced]
    kept = [f"{module}.{name}" for module, name in parts if str(module).startswith("fewstep.")]
    return (*(dotted(cls) for cls in (*network, *scheduler, *pixels)), *kept)


def dotted(cls: type) -> str:
    """A class by its module and name."""
    return f"{cls.__module__}.{cls.__name__}"


def _scale(student: NetworkDenoiser) -> dict[str, float]:
    """The guidance scale that the pipeline is told, where its own network takes one and the student was trained so."""
    if student.guidance_range is None or GUIDANCE in student.graft.names:
        return {}
    return {"guidance_scale": middle(student.guidance_range)}


def _refuse_lora(student: NetworkDenoiser, recipe: Recipe) -> None:
    if student.adapter == BASE:
        raise UserError(
            "--lora: this run trained all weights (student.lora is null), so there are no adapters to write"
        )
    if not recipe.lora:
        raise UserError(f"--lora: {recipe.pipeline} loads no adapters; leave it out, and they are added to the weights")
    if student.graft.own or student.graft.names:
        inputs = ", ".join(student.graft.names) or GUIDANCE
        raise UserError(
            f"--lora: beside its adapters the student has an input ({inputs}) of its own, for which a file of adapters "
            "has no place; leave it out"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"export: {path} cannot be read; the teacher must be a diffusers pipeline folder") from error
