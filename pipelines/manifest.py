"""`fewstep.json`: what an export is, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.exported import MANIFEST

NAME = MANIFEST


@dataclass(frozen=True)
class Manifest:
    """How an export is sampled and where it comes from.

    Attributes:
        pipeline: the pipeline's class in diffusers.
        call: the pipeline's arguments for one sampling.
        sampler: the same steps as fewstep's own sampler.
        component: the name of its network; here and below, empty in exports older than the field.
        scheduler: the scheduler's class, with its module.
        guidance: the scale it is sampled with; 1, off, for a student.
        guidance_range: the scales that its network takes as an input; None: it takes none.
        few_step: whether it was made for this sampler's number of steps; None in exports older than the field.
        teaches: whether it may be another run's teacher: at every time it predicts what an ODE's solver wants to know.
        guided: whether it has learnt the guided teacher's prediction, in one evaluation a step.
        schedule: its process in the words of a scheduler's config, where the scheduler keeps the steps but no shift.
        labelled: whether it takes class labels.
        classes: names of the classes by number; empty where there are none or they are not known.
        missing: components that the pipeline wants and the folder lacks; they load as None.
        own: fewstep's classes among the others, with their modules, which must be imported before the folder loads.
        base: the pipeline folder or hub name that the file of adapters goes onto; None: the folder is a pipeline.
        adapters: that file.
        config: the resolved run.
        version: of fewstep.
    """

    pipeline: str
    call: Mapping[str, Any]
    sampler: Sampler
    component: str = ""
    scheduler: str = ""
    guidance: float = 1.0
    guidance_range: tuple[float, float] | None = None
    few_step: bool | None = None
    teaches: bool = True
    guided: bool = False
    schedule: Mapping[str, Any] = field(default_factory=dict)
    labelled: bool = False
    classes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    base: str | None = None
    adapters: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


def modules(manifest: Manifest) -> list[str]:
    """The modules of fewstep's classes in an export, which diffusers does not import by itself."""
    return sorted({name.rpartition(".")[0] for name in manifest.own})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `fewstep.json` into `folder`."""
    (folder / NAME).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def is_export(folder: Path) -> bool:
    """Whether fewstep wrote the folder."""
    return (folder / NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        older = {"component": "", "scheduler": ""}  # which exports of the first version do not tell
        values = older | json.loads((folder / NAME).read_text())
        sampler = Sampler(tuple(values["sampler"]["times"]), values["sampler"]["kind"])
        lists = {key: tuple(values[key]) for key in ("classes", "missing", "own") if key in values}
        ends = values.get("guidance_range")
        ranged = None if ends is None else (float(ends[0]), float(ends[1]))
        return Manifest(**{**values, **lists, "sampler": sampler, "guidance_range": ranged})
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder / NAME}: missing or damaged; export the run again") from error
