"""`fewstep.json`, as far as those who open an export's network must know it; the rest is the exporter's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

MANIFEST = "fewstep.json"


@dataclass(frozen=True)
class Exported:
    """What an export says of its student. A folder that fewstep did not write says nothing.

    Attributes:
        schedule: the student's process in the words of a scheduler's config, where the scheduler beside it keeps the
            steps but not the shift; empty: the scheduler says all.
        guidance_range: the guidance scales that it takes as an input; None: it takes none.
        teaches: whether it may be another run's teacher: at every time it predicts what an ODE's solver wants to know.
        guided: whether it has learnt the guided teacher's prediction, so that no further guidance is wanted.
        component: the name of its network; empty in exports older than the field.
        base: the pipeline that its file of adapters goes onto; None: the folder is a pipeline.
        adapters: that file.
    """

    schedule: Mapping[str, Any] = field(default_factory=dict)
    guidance_range: tuple[float, float] | None = None
    teaches: bool = True
    guided: bool = False
    component: str = ""
    base: str | None = None
    adapters: str | None = None


def is_exported(folder: Path) -> bool:
    """Whether fewstep wrote the folder."""
    return (folder / MANIFEST).is_file()


def read_exported(folder: Path) -> Exported:
    """What an export says; of every other folder nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / MANIFEST
    if not is_exported(folder):
        return Exported()
    try:
        told = json.loads(path.read_text())
        known = {name: told[name] for name in Exported.__dataclass_fields__ if name in told}
        if (ends := known.get("guidance_range")) is not None:
            known["guidance_range"] = (float(ends[0]), float(ends[1]))
        if (adapters := known.get("adapters")) is not None and adapters != Path(adapters).name:
            raise ValueError(f"{adapters} is outside the folder")
        return Exported(**known)
    except (OSError, ValueError, TypeError, IndexError, KeyError) as error:
        raise UserError(f"{path}: missing or damaged; export the run again") from error
