"""A student as an ordinary diffusers pipeline folder, or as adapters for one, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import __version__, registry
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import middle
from fewstep.models.load import pipeline_folder, resolve
from fewstep.models.schedule import schedule_words
from fewstep.training.finished import load_run

from .card import CardFacts, card, license_of
from .check import check
from .components import missing_in_teacher, write_components
from .folder import whole_folder
from .lora_file import FILE, write_adapters
from .manifest import Manifest, write_manifest
from .merge import as_stored
from .plan import Form, Plan, dotted, own_classes, plan_of


def export_run(
    run_dir: Path,
    out: Path,
    verify: bool = True,
    metrics: Mapping[str, Any] | None = None,
    form: Form = Form(),
) -> float | None:
    """Write the averaged student of a run's last checkpoint to `out`, and check it in a fresh process.

    Args:
        run_dir: the run's folder.
        out: the folder to make. An earlier export there is replaced.
        verify: whether to check it.
        metrics: figures for its card.
        form: of the files; diffusers computes in float32 with weights of another dtype unless told otherwise.

    Returns:
        The largest difference between its reloaded samples and fewstep's, or None where that was not asked for.

    Raises:
        UserError: there is no checkpoint, the student cannot leave, or `out` holds something else, or what the run
            started from.
        ReloadFailure: the reloaded export makes other samples.
    """
    finished = load_run(run_dir)
    config = finished.config
    _refuse_sources(out, {"teacher.path": config.teacher.path, "student.path": config.student.path})
    folder = pipeline_folder(resolve(config.teacher.path)) if config.teacher.path else None
    method = registry.get(config.method.name)
    facts = CardFacts(
        method=config.method.name,
        paper=method.paper,
        teacher=config.teacher.path,
        config=config.model_dump(mode="json"),
        classes=finished.classes,
        metrics=metrics or {},
        license=license_of(folder),
        few_step=finished.few_step,
        teaches=not finished.few_step or method.claims.guided or method.claims.follows_ode,
        guided=method.claims.guided,
    )
    student = as_stored(finished.student, form)
    export_student(student, finished.sampler, folder, out, facts, form)
    return check(out, student, finished.sampler) if verify else None


def _refuse_sources(out: Path, sources: Mapping[str, str | None]) -> None:
    """An earlier export is replaced, but not one that the run needs when it goes on."""
    for place, path in sources.items():
        if path is not None and Path(path).resolve() == out.resolve():
            raise UserError(f"export: {out} is the run's {place}; give a new folder")


def export_student(
    student: NetworkDenoiser,
    sampler: Sampler,
    teacher_folder: Path | None,
    out: Path,
    facts: CardFacts,
    form: Form = Form(),
) -> None:
    """Write `out`: the student's weights, its scheduler, the teacher's other components and a model card.

    The classes are diffusers' own wherever they can run the student; where not, they are those of this package.

    Args:
        student: with the weights to export; adapters are merged, unless `form` asks for them alone.
        sampler: how it makes samples.
        teacher_folder: the teacher's pipeline folder; None where the student is all there is.
        out: the folder to make. An earlier export there is replaced.
        facts: what the card tells.
        form: of the files.

    Raises:
        UserError: `out` holds something else, or no scheduler or pipeline can run the student.
    """
    plan = plan_of(student, sampler, teacher_folder, form)
    with whole_folder(out) as partial:
        if form.lora:
            write_adapters(partial, plan, student, form)
            missing = missing_in_teacher(plan)
        else:
            missing = write_components(partial, plan, student, sampler, form)
        manifest = _manifest(plan, student, sampler, facts, missing, form)
        write_manifest(partial, manifest)
        (partial / "README.md").write_text(card(facts, manifest, plan.recipe, plan.contract, out), encoding="utf-8")


def _manifest(
    plan: Plan, student: NetworkDenoiser, sampler: Sampler, facts: CardFacts, missing: tuple[str, ...], form: Form
) -> Manifest:
    ranged = student.guidance_range
    base = facts.teacher or str(plan.teacher_folder)
    return Manifest(
        pipeline=plan.recipe.pipeline,
        component=student.family.component,
        scheduler=dotted(plan.scheduler),
        call=plan.call,
        sampler=sampler,
        guidance=facts.guidance if ranged is None else middle(ranged),
        guidance_range=ranged,
        few_step=facts.few_step,
        teaches=facts.teaches,
        guided=facts.guided,
        schedule=schedule_words(student.process, student.preconditioning),
        labelled=student.null is not None and student.null.labels is not None,
        classes=facts.classes,
        missing=missing,
        own=own_classes(student, plan),
        base=base if form.lora else None,
        adapters=FILE if form.lora else None,
        config=facts.config,
        version=__version__,
    )
