"""A student as an ordinary diffusers pipeline folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep import __version__, registry
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import middle
from fewstep.models.load import resolve
from fewstep.training.finished import load_run

from .card import CardFacts, card, license_of
from .check import check
from .manifest import Manifest, is_export, write_manifest
from .merge import plain_network, round_weights, store_weights_as
from .recipes import Recipe, recipe_of
from .schedulers import Contract, contract_of

_INDEX = "model_index.json"
_OTHER_WEIGHTS = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.xml")


@dataclass(frozen=True)
class _Plan:
    """Everything decided before anything is written."""

    recipe: Recipe
    contract: Contract
    call: Mapping[str, Any]
    teacher_folder: Path | None
    teacher_index: Mapping[str, Any]


def export_run(
    run_dir: Path,
    out: Path,
    verify: bool = True,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> float | None:
    """Write the averaged student of a run's last checkpoint to `out`, and check it in a fresh process.

    Args:
        run_dir: the run's folder.
        out: the folder to make. An earlier export there is replaced.
        verify: whether to check it.
        metrics: figures for its card.
        dtype: of the weights in the file; diffusers computes in float32 with them unless told otherwise.

    Returns:
        The largest difference between its reloaded samples and fewstep's, or None where that was not asked for.

    Raises:
        UserError: there is no checkpoint, the student cannot leave, or `out` holds something else.
        ReloadFailure: the reloaded export makes other samples.
    """
    finished = load_run(run_dir)
    config = finished.config
    folder = resolve(config.teacher.path) if config.teacher.path else None
    facts = CardFacts(
        method=config.method.name,
        paper=registry.get(config.method.name).paper,
        teacher=config.teacher.path,
        config=config.model_dump(mode="json"),
        classes=finished.classes,
        metrics=metrics or {},
        license=license_of(folder),
    )
    round_weights(finished.student.network, dtype)
    export_student(finished.student, finished.sampler, folder, out, facts, dtype)
    return check(out, finished.student, finished.sampler) if verify else None


def export_student(
    student: NetworkDenoiser,
    sampler: Sampler,
    teacher_folder: Path | None,
    out: Path,
    facts: CardFacts,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `out`: the student's plain weights, a stock scheduler, the teacher's other components and a model card.

    Args:
        student: with the weights to export; adapters are merged.
        sampler: how it makes samples.
        teacher_folder: the teacher's pipeline folder; None where the student is all there is.
        out: the folder to make. An earlier export there is replaced.
        facts: what the card tells.
        dtype: of the weights in the file.

    Raises:
        UserError: `out` holds something else, or no stock scheduler or pipeline can run the student.
    """
    _refuse_foreign(out)
    plan = _plan(student, sampler, teacher_folder)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        missing = _write(partial, plan, student, dtype)
        manifest = _manifest(plan, student, sampler, facts, missing)
        write_manifest(partial, manifest)
        (partial / "README.md").write_text(card(facts, manifest, plan.recipe, plan.contract, out), encoding="utf-8")
        _put_in_place(partial, out)
    except OSError as error:
        raise UserError(f"export: {out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _manifest(
    plan: _Plan, student: NetworkDenoiser, sampler: Sampler, facts: CardFacts, missing: tuple[str, ...]
) -> Manifest:
    return Manifest(
        pipeline=plan.recipe.pipeline,
        call=plan.call,
        sampler=sampler,
        guidance=_scale(student).get("guidance_scale", facts.guidance),
        labelled=student.null is not None and student.null.labels is not None,
        classes=facts.classes,
        missing=missing,
        config=facts.config,
        version=__version__,
    )


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"export: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"export: {out} holds something other than an export; give a new folder")


def _put_in_place(partial: Path, out: Path) -> None:
    """An earlier export steps aside first and goes last, so that a failure between leaves one of the two."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _plan(student: NetworkDenoiser, sampler: Sampler, teacher_folder: Path | None) -> _Plan:
    index = _read(teacher_folder / _INDEX) if teacher_folder else {}
    recipe = recipe_of(student, index.get("_class_name"))
    config = _read(teacher_folder / "scheduler" / "scheduler_config.json") if teacher_folder else {}
    contract = contract_of(student.process, student.kind, sampler, config)
    return _Plan(recipe, contract, {**recipe.call(contract), **_scale(student)}, teacher_folder, index)


def _scale(student: NetworkDenoiser) -> dict[str, float]:
    """The guidance scale that the pipeline is told, where the student takes one."""
    return {} if student.guidance_range is None else {"guidance_scale": middle(student.guidance_range)}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"export: {path} cannot be read; the teacher must be a diffusers pipeline folder") from error


def _write(folder: Path, plan: _Plan, student: NetworkDenoiser, dtype: torch.dtype) -> tuple[str, ...]:
    """All components and the index; the names of those the pipeline wants and the teacher's folder lacks."""
    import diffusers

    network: Any = plain_network(student)
    store_weights_as(network, dtype)
    network.save_pretrained(folder / student.family.component, safe_serialization=True)
    plan.contract.scheduler.save_pretrained(folder / "scheduler")
    own = {
        "_class_name": plan.recipe.pipeline,
        "_diffusers_version": diffusers.__version__,
        student.family.component: ["diffusers", type(network).__name__],
        "scheduler": ["diffusers", type(plan.contract.scheduler).__name__],
    }
    others = _others(plan, own)
    absent = [name for name, entry in others.items() if _lacks(plan, name, entry, folder)]
    index = {**others, **{name: [None, None] for name in absent}, **own}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    optional = getattr(diffusers, plan.recipe.pipeline)._optional_components
    return tuple(name for name in absent if name not in optional)


def _others(plan: _Plan, own: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's entries beside the network and the scheduler; none for a pipeline that has only these two."""
    if plan.teacher_index.get("_class_name") != plan.recipe.pipeline:
        return {}
    return {key: value for key, value in plan.teacher_index.items() if key not in own and not key.startswith("_")}


def _lacks(plan: _Plan, name: str, entry: object, folder: Path) -> bool:
    """Copy a component of the teacher; True where there is none, or its weights are not in safetensors."""
    if not isinstance(entry, list):
        return False  # a plain argument of the pipeline
    assert plan.teacher_folder is not None
    source = plan.teacher_folder / name
    if not source.is_dir() or (_holds(source, _OTHER_WEIGHTS) and not _holds(source, ("*.safetensors",))):
        return True
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*_OTHER_WEIGHTS, ".*"))
    return False


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
