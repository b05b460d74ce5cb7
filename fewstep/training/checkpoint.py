"""Checkpoints: safetensors and JSON, written to a temporary folder and renamed, so none is ever half there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.config import RunConfig
from fewstep.config_file import flat
from fewstep.errors import UserError
from fewstep.models.players import Average
from fewstep.rng import RngState
from fewstep.training.loop import TrainState
from fewstep.training.optim import PlayerOptimizer

STATE = "state.json"
_PREFIX = "step-"
_PARTIAL = ".partial-"
_FREE_TO_CHANGE = (
    "run.dir",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_last",
    "train.log_every",
    "train.sample_every",
    "train.max_bad_steps",
    "train.resume",
    "train.threads",
    "train.accumulate",
    "data.workers",
)


def save(folder: Path, state: TrainState) -> Path:
    """Write `folder/step-NNNNNNNN` whole or not at all, then drop the oldest beyond `train.keep_last`."""
    final = folder / f"{_PREFIX}{state.step:08d}"
    _sweep(folder)
    partial = folder / f"{_PARTIAL}{final.name}"
    partial.mkdir(parents=True)
    tensors = _tensors(state)
    for name, content in tensors.items():
        save_file({k: v.contiguous() for k, v in content.items()}, partial / name)
    _write_json(partial / STATE, _facts(state, {name: sha256(partial / name) for name in tensors}))
    _sync(partial)
    _drop(final)
    partial.rename(final)
    _sync_folder(folder)
    for old in list_checkpoints(folder)[: -state.config.train.keep_last]:
        _drop(old)
    return final


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, under another name: half removed it must not pass for a whole one."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{_PARTIAL}old-{checkpoint.name}")))


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / STATE).is_file())


def restore_last(folder: Path, state: TrainState, warn: Callable[[str], None]) -> Path | None:
    """Restore the newest checkpoint of a folder that is whole, telling of those that are not; None where there is none.

    Raises:
        UserError: there are checkpoints and all are damaged, or the run's config is another.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            restore(checkpoint, state)
        except Damaged as error:
            if checkpoint == found[0]:
                raise Damaged(f"{error}, and no other is whole; remove {folder} to start the run anew") from error
            warn(f"{error}; going back to the one before")
        else:
            return checkpoint
    return None


def restore(checkpoint: Path, state: TrainState) -> None:
    """Put a checkpoint's every tensor and counter into a freshly assembled state; all or nothing.

    Raises:
        Damaged: a file is not what was written.
        UserError: the run's config differs where it decides the result.
    """
    facts = _read_facts(checkpoint)
    _refuse_other_config(checkpoint, facts["config"], state.config)
    files = {name: _load_checked(checkpoint / name, digest) for name, digest in facts["sha256"].items()}
    for name, player in state.method.players.items():
        _copy(files[f"player-{name}.safetensors"], player.parameters)
        _restore_optimizer(state.optimizers[name], files[f"optimizer-{name}.safetensors"])
    for name, average in state.method.averages.items():
        _copy(files[f"average-{name}.safetensors"], average.shadow)
        average.updates = facts["updates"][name]
    state.rng.restore(RngState(files["rng.safetensors"]["device"], files["rng.safetensors"]["host"]))
    state.loader.position = facts["samples"]
    state.step = facts["step"]


def load_average(checkpoint: Path, name: str, average: Average) -> None:
    """Only one average of a checkpoint, for sampling and export."""
    facts = _read_facts(checkpoint)
    file = f"average-{name}.safetensors"
    _copy(_load_checked(checkpoint / file, facts["sha256"][file]), average.shadow)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for name, player in state.method.players.items():
        out[f"player-{name}.safetensors"] = {key: p.detach() for key, p in player.parameters.items()}
        out[f"optimizer-{name}.safetensors"] = _optimizer_tensors(state.optimizers[name])
    for name, average in state.method.averages.items():
        out[f"average-{name}.safetensors"] = {key: value.detach() for key, value in average.shadow.items()}
    rng = state.rng.state()
    out["rng.safetensors"] = {"device": rng.device, "host": rng.host}
    return out


def _facts(state: TrainState, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "step": state.step,
        "samples": state.loader.state()["samples"],
        "updates": {name: average.updates for name, average in state.method.averages.items()},
        "sha256": dict(digests),
        "torch": torch.__version__,
        "config": state.config.model_dump(mode="json"),
    }


def _optimizer_tensors(optimizer: PlayerOptimizer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, parameter in optimizer.player.parameters.items():
        for key, value in optimizer.adamw.state.get(parameter, {}).items():
            out[f"{key}/{name}"] = value
    return out


def _restore_optimizer(optimizer: PlayerOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Moments in the memory layout of their parameter: another one would take another kernel, and round differently."""
    parameters, state = optimizer.player.parameters, optimizer.adamw.state
    state.clear()
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        if kind == "step":
            value = value.to(parameter.device)  # where the fused kernel counts
        else:
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        state[parameter][kind] = value


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / STATE) from error


class Damaged(UserError):
    """A checkpoint whose files are not what was written."""


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path}: damaged or missing; {path.parent} cannot be used")


def _load_checked(path: Path, digest: str) -> dict[str, Tensor]:
    if not path.is_file() or sha256(path) != digest:
        raise _damaged(path)
    return load_file(path)


def _refuse_other_config(checkpoint: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    from fewstep.config_file import parse

    old, new = flat(parse(saved)), flat(config)
    different = [k for k in sorted({*old, *new}) if k not in _FREE_TO_CHANGE and old.get(k) != new.get(k)]
    if different:
        told = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in different[:5])
        raise UserError(f"{checkpoint} was made by another config ({told}); change run.dir, or undo the change")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def _sync(folder: Path) -> None:
    """Force a folder's files to disk before it is renamed."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
