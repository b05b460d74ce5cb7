"""`fewstep.json`: what an export is, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError

NAME = "fewstep.json"


@dataclass(frozen=True)
class Manifest:
    """How an export is sampled and where it comes from.

    Attributes:
        pipeline: the stock pipeline's class.
        call: its arguments for one sampling.
        sampler: the same steps as fewstep's own sampler.
        guidance: the scale it is sampled with; 1, off, for a student.
        labelled: whether it takes class labels.
        classes: names of the classes by number; empty where there are none or they are not known.
        missing: components that the pipeline wants and the folder lacks; they load as None.
        config: the resolved run.
        version: of fewstep.
    """

    pipeline: str
    call: Mapping[str, Any]
    sampler: Sampler
    guidance: float = 1.0
    labelled: bool = False
    classes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


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
        values = json.loads((folder / NAME).read_text())
        sampler = Sampler(tuple(values["sampler"]["times"]), values["sampler"]["kind"])
        lists = {key: tuple(values[key]) for key in ("classes", "missing")}
        return Manifest(**{**values, **lists, "sampler": sampler})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / NAME}: missing or damaged; export the run again") from error
