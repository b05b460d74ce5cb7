"""What lies in the folder of a cache: a plan, shards of latents and prompts, the null condition, and an index.

The plan says what decides every byte and is written first; the index, with the checksums, is written last. What is in
the folder under its final name is whole: every file is written under another name, forced to disk and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.row_file import RowFile
from fewstep.errors import RunError, UserError

PLAN, INDEX, NULL = "plan.json", "index.json", "null.safetensors"
LATENTS, LABELS, PROMPT = "latents", "labels", "prompt"
"""Tensors of a shard: latents `(N, *)`, class numbers `(N,)`, and the row `(N,)` of each sample's prompt."""
CONDITION, SHARED = "condition.", "shared."
"""How the names of a condition's tensors begin: rows of distinct prompts, and values that hold for all."""
FORMAT = 1
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Plan:
    """What decides every byte of a cache.

    Attributes:
        teacher: the pipeline's path or name.
        encoders: digest of the configs of its VAE and text encoders; empty where it has neither.
        data: the data set's name.
        path: where that lies; None for an embedded one.
        options: its options.
        size: side of the images in pixels.
        seed: of an endless set.
        contents: digest of the captions.
        samples: their number, mirrored ones included.
        flip: whether every image is there a second time, mirrored.
        pixels: whether there are latents; false for prompts alone.
        classes: names of the classes, where samples have labels in place of prompts.
        dtype: of latents and embeddings in the files.
        batch: images or prompts that were encoded together.
        shard_size: samples in a shard.
        weights: digest of those of its VAE and of each text encoder; none in caches of earlier versions.
    """

    teacher: str
    encoders: str
    data: str
    path: str | None
    options: Mapping[str, Any]
    size: int
    seed: int
    contents: str
    samples: int
    flip: bool
    pixels: bool
    classes: tuple[str, ...]
    dtype: str
    batch: int
    shard_size: int
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_size)

    def rows(self, number: int) -> range:
        """The samples of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.samples))

    def command(self, folder: Path) -> str:
        """What makes this cache in `folder`, and what is missing of it."""
        words = ["fewstep", "cache", self.teacher, str(folder), "--data", self.data, "--size", self.size]
        words += ["--path", self.path] if self.path is not None else []
        words += ["--samples", self.samples // (2 if self.flip else 1)]
        words += [word for key, value in self.options.items() for word in ("--option", f"{key}={json.dumps(value)}")]
        words += ["--seed", self.seed, "--batch", self.batch, "--shard-size", self.shard_size, "--dtype", self.dtype]
        return shlex.join(map(str, [*words, *(["--flip"] if self.flip else [])]))


@dataclass(frozen=True)
class FileFacts:
    """One file of a cache as it was written."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A finished cache.

    Attributes:
        plan: what it was made of.
        shape: of one sample's latents.
        lengths: tokens of the longest prompt, for each of the condition's tensors that has tokens.
        shared: the condition's values that hold for all prompts, tensors aside.
        null: the file of the null condition; None without prompts.
        shards: in the order of their samples.
    """

    plan: Plan
    shape: tuple[int, ...]
    lengths: Mapping[str, int]
    shared: Mapping[str, Any]
    null: FileFacts | None
    shards: tuple[FileFacts, ...]


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_plan(folder: Path, plan: Plan) -> None:
    """Begin a cache, or go on with it.

    Raises:
        UserError: the folder cannot be written, holds something else, or a cache of another plan.
    """
    found = read_plan(folder)
    if found is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(f"cache: {folder} is not empty, and no cache; give a folder of its own")
            _write_json(folder / PLAN, {"format": FORMAT, **dataclasses.asdict(plan)})
        except OSError as error:
            raise UserError(f"cache: {folder} cannot be written ({error.strerror})") from error
        return
    ours, its = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (plan, found))
    if not its["weights"]:
        del ours["weights"]  # nothing is known of what an earlier version began with
    other = [name for name in ours.get("weights", {}) if its["weights"].get(name) != ours["weights"][name]]
    if other:
        raise UserError(f"cache: {folder} was begun by a {other[0]} of other weights than that of {plan.teacher} now; "
                        "give another folder")  # fmt: skip
    different = [f"{key} was {its[key]!r}, is {ours[key]!r}" for key in ours if its[key] != ours[key]]
    if different:
        raise UserError(f"cache: {folder} was begun otherwise ({'; '.join(different[:3])}); give another folder, or "
                        f"go on with: {found.command(folder)}")  # fmt: skip
    for left in folder.glob(f".*{_PARTIAL}"):  # by a run that was killed while it wrote
        left.unlink()


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder; None where there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    return _plan(path, _read_json(path))


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under their final name when all of them are on the disk.

    Raises:
        RunError: the disk does not take them.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
        _settle(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise RunError(f"cache: {path} cannot be written ({reason}); the same command goes on from there") from error


def facts_of(path: Path) -> FileFacts:
    """A file as it lies there."""
    opened = RowFile.open(path)
    samples = opened.shape(PROMPT)[0] if PROMPT in opened.places else 0
    samples = opened.shape(LATENTS)[0] if LATENTS in opened.places else samples
    return FileFacts(path.name, samples, path.stat().st_size, sha256(path))


def is_whole(path: Path) -> bool:
    """Whether a file is there and as long as it says."""
    try:
        RowFile.open(path)
    except (OSError, ValueError):
        return False
    return True


def write_index(folder: Path, index: Index) -> None:
    """Finish a cache."""
    _write_json(folder / INDEX, {"format": FORMAT, **dataclasses.asdict(index)})


def read_index(folder: Path) -> Index:
    """The index of a finished cache.

    Raises:
        UserError: there is none, or it is damaged; the line says how to go on.
    """
    path = folder / INDEX
    if not path.is_file():
        plan = read_plan(folder)
        if plan is not None:
            raise UserError(f"data.path: {folder} is unfinished; go on with: {plan.command(folder)}")
        raise UserError(f"data.path: {folder} holds no cache (no {INDEX}); `fewstep cache` makes one")
    values = _read_json(path)
    try:
        null = None if values["null"] is None else FileFacts(**values["null"])
        shards = tuple(FileFacts(**one) for one in values["shards"])
        return Index(_plan(path, {"format": values["format"], **values["plan"]}), tuple(values["shape"]),
                     values["lengths"], values["shared"], null, shards)  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"data.path: {path} is damaged ({error}); remove it and run `fewstep cache` again") from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plan(path: Path, values: Mapping[str, Any]) -> Plan:
    if values.get("format") != FORMAT:
        raise UserError(f"data.path: {path} is of format {values.get('format')!r}, {FORMAT} is read; make a new cache")
    try:
        facts = {key: value for key, value in values.items() if key != "format"}
        return Plan(**{**facts, "classes": tuple(facts["classes"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"data.path: {path} is damaged ({error}); make a new cache") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {path} cannot be read ({error}); make a new cache") from error
    if not isinstance(values, dict):
        raise UserError(f"data.path: {path} is damaged; make a new cache")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    _settle(partial, path)


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)
