"""Checkpoints: safetensors and JSON, written to a temporary folder and renamed, so none is ever half there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.errors import RunError
from fewstep.models.shards import joined
from fewstep.training.failures import what_is_left
from fewstep.training.integrity import Damaged, sealed, sha256
from fewstep.training.loop import TrainState
from fewstep.training.optim import PlayerOptimizer
from fewstep.training.processes import told_by_all
from fewstep.training.restoring import RNG, load_average, restore, restore_last
from fewstep.training.retention import PARTIAL, PREFIX, STATE, drop, list_checkpoints, point_at, superfluous, sweep
from fewstep.training.tensor_files import write

__all__ = ["STATE", "Damaged", "list_checkpoints", "load_average", "restore", "restore_last", "save", "sha256"]

P = ParamSpec("P")
Result = TypeVar("Result")


def save(folder: Path, state: TrainState) -> Path:
    """Write `folder/step-NNNNNNNN` whole or not at all, then drop what `train.keep_last` and `keep_every` leave over.

    Every process calls, and writes its own parts of what is spread; the first one all else. None goes on before all
    have written, and what one cannot write, none has.

    Raises:
        RunError: it could not be written, in all processes; what was there before stays.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    rank, world = state.accelerator.process_index, state.accelerator.num_processes
    attempt = _Attempt(state.accelerator.device)
    try:
        if rank == 0:
            attempt(_make_empty, partial)
        attempt.agree()
        written: dict[str, str] = {}
        for name, content in _contents(state):
            written |= attempt(write, partial, name, content, rank, world) or {}
        digests = attempt.agree(written)
        if rank == 0:
            attempt(_finish, partial, final, _facts(state, digests))
        attempt.agree()
    except _Refused as refused:
        if rank == 0:  # give back the room that the half written checkpoint takes
            attempt.again(sweep, folder)
        text = f"{final.name} cannot be written ({refused}); {what_is_left(folder)}"
        raise RunError(f"{folder}: {text}") from attempt.problem
    if rank == 0:
        point_at(final)
        # A later one is damaged, or the run would have gone on from it: it must not pass for one of the last.
        found = [one for one in list_checkpoints(folder) if one <= final]
        for old in superfluous(found, state.config.train.keep_last, state.config.train.keep_every):
            with suppress(OSError):  # somebody reads it, on a shared disk: the next save tries again
                drop(old)
    return final


class _Refused(Exception):
    """The disk of one process takes no more; the text says why."""


class _Attempt:
    """Does one thing after the other until one fails for a reason of the disk, and keeps that reason.

    What follows is left out, so that a process whose disk is full still takes part in what the others wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problem: OSError | SafetensorError | None = None

    def __call__(self, do: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | None:
        if self.problem is None:
            return self.again(do, *args, **kwargs)
        return None

    def again(self, do: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | None:
        """Whatever failed before; the first problem is the one that is kept."""
        try:
            return do(*args, **kwargs)
        except (OSError, SafetensorError) as error:
            self.problem = self.problem or error
        return None

    def agree(self, written: Mapping[str, str] | None = None) -> dict[str, str]:
        """What all processes have written, by file; none goes on before all are there.

        Raises:
            _Refused: one of them has failed, in all.
        """
        problem = None if self.problem is None else _first_line(self.problem)
        reports = [json.loads(told) for told in told_by_all(json.dumps([problem, dict(written or {})]), self.device)]
        for reason, _ in reports:
            if reason is not None:
                raise _Refused(reason)
        return {file: digest for _, its in reports for file, digest in its.items()}


def _make_empty(partial: Path) -> None:
    sweep(partial.parent)
    partial.mkdir(parents=True)


def _finish(partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
    _write_json(partial / STATE, sealed(facts))
    _sync(partial)
    drop(final)
    partial.rename(final)
    _sync_folder(final.parent)


def _contents(state: TrainState) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The sets of tensors of a checkpoint by name; some tensors may be spread."""
    for name, player in state.method.players.items():
        yield f"player-{name}", player.parameters
        yield f"optimizer-{name}", _optimizer_tensors(state.optimizers[name])
    for name, average in state.method.averages.items():
        yield f"average-{name}", average.shadow
    rng = state.rng.state()
    yield RNG, {"device": rng.device, "host": rng.host}


def _facts(state: TrainState, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "step": state.step,
        "samples": state.loader.state()["samples"],
        "updates": {name: average.updates for name, average in state.method.averages.items()},
        "skips": {name: optimizer.skips.read() for name, optimizer in state.optimizers.items()},
        "sha256": dict(digests),
        "torch": torch.__version__,
        "device": state.accelerator.device.type,
        "config": state.config.model_dump(mode="json"),
    }


def _optimizer_tensors(optimizer: PlayerOptimizer) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, parameter in optimizer.player.parameters.items():
        for key, value in optimizer.adamw.state.get(optimizer.leaves[name], {}).items():
            kept = torch.as_tensor(value)  # bitsandbytes counts steps in a plain number
            whole_already = kept.shape != optimizer.leaves[name].shape  # a step
            out[f"{key}/{name}"] = kept if whole_already else joined(kept, parameter)
    return out


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w") as stream:
        stream.write(json.dumps(value, indent=1))
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Force to the disk which files a folder holds, before it is renamed; each is there already."""
    for inner in folder.iterdir():
        if inner.is_dir():
            _sync_folder(inner)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
