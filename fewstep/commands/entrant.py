"""Who takes part in a report: trained runs and exports, each with the teacher that it imitates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fewstep import registry
from fewstep.config import RunConfig
from fewstep.config_file import flat, parse
from fewstep.errors import UserError
from fewstep.models.guidance_input import middle
from fewstep.models.load import embedded_teachers, resolve
from fewstep.pipelines.manifest import is_export, read_manifest
from fewstep.training import checkpoint
from fewstep.training.assemble import EMA
from fewstep.training.finished import read_config
from fewstep.training.integrity import digest_of

_PLACES = ("run.", "student.path", "method.pairs")
"""Settings in which the seeds of one method differ: their places, and what an earlier stage of each left."""


@dataclass(frozen=True)
class Teacher:
    """A teacher at a guidance scale: its path as a run names it, and the hash of its files."""

    path: str
    scale: float
    source: str

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"teacher {self.path if self.path in embedded_teachers() else Path(self.path).name}"


@dataclass(frozen=True)
class Entrant:
    """A student, with what made it.

    Attributes:
        folder: of the run or the export.
        config: of the run.
        steps: the step counts at which it is measured.
        scale: of guidance at which it is sampled.
        teacher: what it imitates; None where it learnt from data alone.
        source: hash of what decides its samples.
        seconds: of training, by the clock; None for an export.
        images: seen in training; None for an export.
    """

    folder: Path
    config: RunConfig
    steps: tuple[int, ...]
    scale: float
    teacher: Teacher | None
    source: str
    seconds: float | None
    images: int | None

    @property
    def settings(self) -> str:
        """Hash of the config without seed and places."""
        return _digest({key: value for key, value in flat(self.config).items() if not key.startswith(_PLACES)})


@dataclass(frozen=True)
class _Cost:
    seconds: float | None = None
    images: int | None = None


def entrant(folder: Path, steps: Sequence[int]) -> Entrant:
    """The student in a folder, at `steps`; none given: those that its method was made for.

    Raises:
        UserError: it is neither a run with a checkpoint nor an export, or it trained a teacher.
    """
    exported = is_export(folder)
    config = _exported_config(folder) if exported else read_config(folder)
    claims = registry.get(config.method.name).claims
    if not claims.steps:
        raise UserError(f"{folder}: {config.method.name} trains a teacher, a student is needed; see `fewstep evaluate`")
    own = claims.steps if claims.one_student else (config.student.steps,)
    scale = scale_of(config)
    path = config.teacher.path
    teacher = None if path is None else Teacher(path, scale, hash_of_pipeline(resolve(path)))
    source, cost = (hash_of_pipeline(folder), _Cost()) if exported else _run(folder, config, teacher)
    return Entrant(folder, config, tuple(steps) or own, scale, teacher, source, cost.seconds, cost.images)


def scale_of(config: RunConfig) -> float:
    """The scale at which a student is sampled, and so its teacher too: of a range the middle."""
    method = config.method.model_dump()
    given = method.get("guidance_range") or method.get("scale") or config.teacher.guidance
    return middle(given) if isinstance(given, tuple) else given


def _exported_config(folder: Path) -> RunConfig:
    config = read_manifest(folder).config
    if not config:
        raise UserError(f"{folder}: an export that does not tell its run; name the run's own folder")
    return parse(config)


def _run(folder: Path, config: RunConfig, teacher: Teacher | None) -> tuple[str, _Cost]:
    """Hash of the last checkpoint's average under the run's config, and what training to there cost."""
    found = checkpoint.list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: no checkpoint yet; it appears after train.checkpoint_every steps")
    facts = json.loads((found[-1] / checkpoint.STATE).read_text())
    settings = {key: value for key, value in flat(config).items() if key != "run.dir"}
    weights = digest_of(facts, f"average-{EMA}")
    source = _digest([weights, settings, None if teacher is None else teacher.source])
    return source, _cost(folder / "log.jsonl", facts["step"])


def _cost(log: Path, step: int) -> _Cost:
    """What the log tells of the last step that it holds and the checkpoint has."""
    lines = map(_line, log.read_text().splitlines()) if log.is_file() else []
    kept = [line for line in lines if line is not None and line["step"] <= step]
    return _Cost(float(kept[-1]["seconds"]), int(kept[-1]["images"])) if kept else _Cost()


def _line(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # torn by a run that was killed, or is at this moment written
        return None


def hash_of_pipeline(folder: Path) -> str:
    """Hash of a pipeline's weights and settings: what its samples depend on, wherever it lies."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file())
    return _digest({path.relative_to(folder).as_posix(): _hash_of(path, path.stat().st_mtime_ns) for path in files})


@cache
def _hash_of(path: Path, _changed: int) -> str:
    """Of one file as it was at that time: twenty students of one teacher read its gigabytes once."""
    return checkpoint.sha256(path)


def _digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
