"""The components of an export: the student's network and scheduler, and what its teacher has beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.diffusion.solvers import Sampler
from fewstep.models.denoiser import NetworkDenoiser

from .merge import exported_network, store_weights_as
from .pixel_vae import PixelVAE
from .plan import Form, Plan

_INDEX = "model_index.json"
_OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.xml")


def write_components(
    folder: Path, plan: Plan, student: NetworkDenoiser, sampler: Sampler, form: Form
) -> tuple[str, ...]:
    """All components and the index; the names of those the pipeline wants and the teacher's folder lacks."""
    import diffusers

    network: Any = exported_network(student, sampler)
    store_weights_as(network, form.dtype)
    component = student.family.component
    network.save_pretrained(folder / component, safe_serialization=True, max_shard_size=form.max_shard_size)
    plan.contract.scheduler.save_pretrained(folder / "scheduler")
    own = {
        "_class_name": plan.recipe.pipeline,
        "_diffusers_version": diffusers.__version__,
        component: _entry(type(network)),
        "scheduler": _entry(plan.scheduler),
    }
    if plan.recipe.pixels:
        PixelVAE().save_pretrained(folder / "vae", safe_serialization=True)
        own["vae"] = _entry(PixelVAE)
    others = _others(plan, own)
    absent = [name for name, entry in others.items() if lacks(plan, name, entry)]
    for name in others:
        if name not in absent and isinstance(others[name], list):
            _copy(plan, name, folder)
    index = {**others, **{name: [None, None] for name in absent}, **own}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return _wanted(plan, absent)


def missing_in_teacher(plan: Plan) -> tuple[str, ...]:
    """Names of the components that the pipeline wants and the teacher's folder lacks."""
    others = {k: v for k, v in plan.teacher_index.items() if not k.startswith("_")}
    return _wanted(plan, [name for name, entry in others.items() if lacks(plan, name, entry)])


def _wanted(plan: Plan, absent: list[str]) -> tuple[str, ...]:
    import diffusers

    optional = getattr(diffusers, plan.recipe.pipeline)._optional_components
    return tuple(name for name in absent if name not in optional)


def _entry(cls: type) -> list[str]:
    """Where diffusers finds the class: in itself, or in a module of fewstep."""
    return ["diffusers" if cls.__module__.startswith("diffusers.") else cls.__module__, cls.__name__]


def _others(plan: Plan, own: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's entries beside the network and the scheduler; none for a pipeline that has only these two."""
    if plan.teacher_index.get("_class_name") != plan.recipe.pipeline:
        return {}
    return {key: value for key, value in plan.teacher_index.items() if key not in own and not key.startswith("_")}


def lacks(plan: Plan, name: str, entry: object) -> bool:
    """Whether the teacher has no such component, or its weights are not in safetensors."""
    if not isinstance(entry, list):
        return False  # a plain argument of the pipeline
    assert plan.teacher_folder is not None
    source = plan.teacher_folder / name
    return not source.is_dir() or (_holds(source, _OTHER_WEIGHTS) and not _holds(source, ("*.safetensors",)))


def _copy(plan: Plan, name: str, folder: Path) -> None:
    assert plan.teacher_folder is not None
    ignored = shutil.ignore_patterns(*_OTHER_WEIGHTS, ".*")
    shutil.copytree(plan.teacher_folder / name, folder / name, ignore=ignored)


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
