"""Whether a checkpoint's files are what was written: `state.json` names each with its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.training.processes import own_share, told_by_all
from fewstep.training.retention import STATE

_SEAL = "seal"


class Damaged(UserError):
    """A checkpoint whose files are not what was written."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(facts: Mapping[str, Any], name: str) -> list[str]:
    """The files of one set of tensors, `average-ema` say: one, or those in the folder of its parts; none if unknown."""
    return [file for file in sorted(facts["sha256"]) if file == f"{name}.safetensors" or file.startswith(f"{name}/")]


def digest_of(facts: Mapping[str, Any], name: str) -> str:
    """One digest for the files of a set of tensors: a single file's own, or that of its parts' digests."""
    digests = [facts["sha256"][file] for file in files_of(facts, name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's JSON holds, with a checksum of its own: a counter with another digit is JSON still."""
    return {**facts, _SEAL: _digest(facts)}


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's JSON says.

    Raises:
        Damaged: it cannot be read, or says something else than what was written.
    """
    try:
        facts = dict(json.loads((checkpoint / STATE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise damaged(checkpoint, STATE) from error
    if facts.pop(_SEAL, None) != _digest(facts):
        raise damaged(checkpoint, STATE)
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check(checkpoint: Path, facts: Mapping[str, Any], file: str) -> None:
    """Refuse a file that is not what was written, or that the disk does not give back.

    Raises:
        Damaged: so it is.
    """
    try:
        whole = sha256(checkpoint / file) == facts["sha256"][file]
    except OSError as error:  # a process that ended here would leave the others waiting for what it has found
        raise damaged(checkpoint, file) from error
    if not whole:
        raise damaged(checkpoint, file)


def verified(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What a checkpoint's JSON says, once every file has been found whole; all processes must ask.

    Each process reads its share of the files, and all hear what any of them finds: none goes on alone.

    Raises:
        Damaged: one of them is not what was written, in all processes.
    """
    facts, problem = {}, ""
    try:
        facts = read_facts(checkpoint)
        for file in own_share(sorted(facts["sha256"])):
            check(checkpoint, facts, file)
    except Damaged as error:
        problem = str(error)
    for told in told_by_all(problem, device):
        if told:
            raise Damaged(told)
    return facts


def damaged(checkpoint: Path, file: str) -> Damaged:
    """The line for a file that cannot be used."""
    return Damaged(f"{checkpoint / file}: damaged or missing; {checkpoint} cannot be used")
