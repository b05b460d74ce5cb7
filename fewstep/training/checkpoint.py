"""Checkpoints: safetensors and JSON, written to a temporary folder and renamed, so none is ever half there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import RunError, UserError
from fewstep.models.players import Average
from fewstep.models.shards import joined, local, spread_like, whole
from fewstep.rng import RngState
from fewstep.training.differences import differences
from fewstep.training.failures import what_is_left
from fewstep.training.loop import TrainState
from fewstep.training.optim import PlayerOptimizer
from fewstep.training.processes import true_in_any
from fewstep.training.retention import PARTIAL, PREFIX, STATE, drop, list_checkpoints, point_at, superfluous, sweep

P = ParamSpec("P")
Result = TypeVar("Result")

_RNG = "rng.safetensors"


def save(folder: Path, state: TrainState) -> Path:
    """Write `folder/step-NNNNNNNN` whole or not at all, then drop what `train.keep_last` and `keep_every` leave over.

    Every process calls: the first one writes, the others give their parts of what is spread, and wait.

    Raises:
        RunError: it could not be written, in all processes; what was there before stays.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    writes = state.accelerator.process_index == 0
    attempt = _Attempt()
    if writes:
        attempt(_make_empty, partial)
    digests: dict[str, str | None] = {}
    for name, content in _contents(state):
        complete = _gathered(content, writes)
        if writes:
            digests[name] = attempt(_write, partial / name, complete)
    if writes:
        attempt(_finish, partial, final, _facts(state, digests))
        attempt.clean(folder)
    if true_in_any(attempt.problem is not None, state.accelerator.device):
        reason = f" ({_first_line(attempt.problem)})" if attempt.problem is not None else ""
        text = f"{final.name} cannot be written{reason}; {what_is_left(folder)}"
        raise RunError(f"{folder}: {text}") from attempt.problem
    if writes:
        point_at(final)
        for old in superfluous(list_checkpoints(folder), state.config.train.keep_last, state.config.train.keep_every):
            drop(old)
    return final


class _Attempt:
    """Does one thing after the other until one fails for a reason of the disk, and keeps that reason.

    What follows is left out, so that a process whose disk is full still takes part in what the others wait for.
    """

    def __init__(self) -> None:
        self.problem: OSError | SafetensorError | None = None

    def __call__(self, do: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result | None:
        if self.problem is None:
            try:
                return do(*args, **kwargs)
            except (OSError, SafetensorError) as error:
                self.problem = error
        return None

    def clean(self, folder: Path) -> None:
        """After a failure, give back the room that the half written checkpoint takes."""
        if self.problem is not None:
            _Attempt()(sweep, folder)


def _make_empty(partial: Path) -> None:
    sweep(partial.parent)
    partial.mkdir(parents=True)


def _gathered(content: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """All of every tensor, in the host's memory of the process that keeps them; the others lend their parts."""
    out = {}
    for name, value in content.items():
        tensor = whole(value)
        if keeps:
            out[name] = tensor.cpu().contiguous()
    return out


def _write(path: Path, content: dict[str, Tensor]) -> str:
    save_file(content, path)
    return sha256(path)


def _finish(partial: Path, final: Path, facts: Mapping[str, Any]) -> None:
    _write_json(partial / STATE, facts)
    _sync(partial)
    drop(final)
    partial.rename(final)
    _sync_folder(final.parent)


def restore_last(
    folder: Path, state: TrainState, warn: Callable[[str], None], forced: Callable[[str], None] | None = None
) -> Path | None:
    """Restore the newest checkpoint of a folder that is whole, telling of those that are not; None where there is none.

    Raises:
        UserError: there are checkpoints and all are damaged, or as for `restore`.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            restore(checkpoint, state, forced)
        except Damaged as error:
            if checkpoint == found[0]:
                raise Damaged(f"{error}, and no other is whole; remove {folder} to start the run anew") from error
            warn(f"{error}; going back to the one before")
        else:
            return checkpoint
    return None


def restore(checkpoint: Path, state: TrainState, forced: Callable[[str], None] | None = None) -> None:
    """Put a checkpoint's every tensor and counter into a freshly assembled state; all or nothing.

    Args:
        checkpoint: the folder.
        state: of any number of processes, whatever number wrote the checkpoint.
        forced: go on though the run's config differs, and tell this of it; None refuses.

    Raises:
        Damaged: a file is not what was written.
        UserError: the run's config differs where it decides the result, or it has other tensors or another device.
    """
    facts = _read_facts(checkpoint)
    _refuse_other_device(checkpoint, facts.get("device"), state.accelerator.device.type)
    _compare(checkpoint, differences(facts["config"], state), forced)
    for name, digest in facts["sha256"].items():
        _check(checkpoint / name, digest)
    players, averages = state.method.players, state.method.averages
    targets = {f"player-{name}": dict(player.parameters) for name, player in players.items()}
    targets |= {f"average-{name}": dict(average.shadow) for name, average in averages.items()}
    _refuse_other_tensors(checkpoint, {**targets, **{f"optimizer-{name}": None for name in players}})
    for name, target in targets.items():
        _fill(checkpoint / f"{name}.safetensors", target)
    for name, optimizer in state.optimizers.items():
        _restore_optimizer(optimizer, load_file(checkpoint / f"optimizer-{name}.safetensors"))
        optimizer.skips.restore(*facts.get("skips", {}).get(name, (0, 0)))
    for name, average in averages.items():
        average.updates = facts["updates"][name]
    rng = load_file(checkpoint / _RNG)
    state.rng.restore(RngState(rng["device"], rng["host"]))
    state.loader.position = facts["samples"]
    state.step = facts["step"]


def load_average(checkpoint: Path, name: str, average: Average) -> None:
    """Only one average of a checkpoint, for sampling and export."""
    path = checkpoint / f"average-{name}.safetensors"
    _check(path, _read_facts(checkpoint)["sha256"][path.name])
    _fill(path, average.shadow)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _contents(state: TrainState) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The files of a checkpoint and their tensors, of which some may be spread."""
    for name, player in state.method.players.items():
        yield f"player-{name}.safetensors", player.parameters
        yield f"optimizer-{name}.safetensors", _optimizer_tensors(state.optimizers[name])
    for name, average in state.method.averages.items():
        yield f"average-{name}.safetensors", average.shadow
    rng = state.rng.state()
    yield _RNG, {"device": rng.device, "host": rng.host}


def _facts(state: TrainState, digests: Mapping[str, str | None]) -> dict[str, Any]:
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
            whole_already = value.shape != optimizer.leaves[name].shape  # a step
            out[f"{key}/{name}"] = value if whole_already else joined(value, parameter)
    return out


def _restore_optimizer(optimizer: PlayerOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Moments in the memory layout of their parameter: another one would take another kernel, and round differently."""
    state = optimizer.adamw.state
    state.clear()
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        leaf, parameter = optimizer.leaves[name], optimizer.player.parameters[name]
        if value.shape != parameter.shape:
            value = value.to(leaf.device)  # a step, where the fused kernel counts
        else:
            part = local(spread_like(value, parameter))
            value = torch.empty_like(leaf, dtype=value.dtype, requires_grad=False).copy_(part)
        state[leaf][kind] = value


@torch.no_grad()
def _fill(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors, one at a time, into those of the same names: all of each, or this process's part."""
    with safe_open(path, framework="pt") as stored:
        for name, target in targets.items():
            local(target).copy_(local(spread_like(stored.get_tensor(name), target)))


def _refuse_other_tensors(checkpoint: Path, wanted: Mapping[str, Mapping[str, Tensor] | None]) -> None:
    """Nothing may be copied before all of it is known to fit."""
    for name, targets in wanted.items():
        path = checkpoint / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{checkpoint}: made by a run without {name.replace('-', ' ', 1)}; change run.dir")
        if targets is None:
            continue
        with safe_open(path, framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
        ours = {key: tuple(value.shape) for key, value in targets.items()}
        other = sorted(key for key in {*shapes, *ours} if shapes.get(key) != ours.get(key))
        if other:
            there, here = shapes.get(other[0], "missing"), ours.get(other[0], "missing")
            raise UserError(f"{path}: {other[0]} is {there}, in this run {here}; such a change needs another run.dir")


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / STATE) from error


class Damaged(UserError):
    """A checkpoint whose files are not what was written."""


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path}: damaged or missing; {path.parent} cannot be used")


def _check(path: Path, digest: str) -> None:
    if not path.is_file() or sha256(path) != digest:
        raise _damaged(path)


def _refuse_other_device(checkpoint: Path, was: str | None, now: str) -> None:
    if was is not None and was != now:
        raise UserError(f"{checkpoint} was made on {was}, this run is on {now}, whose random stream is another; "
                        f"go on on {was}, or change run.dir")  # fmt: skip


def _compare(checkpoint: Path, different: list[str], forced: Callable[[str], None] | None) -> None:
    if not different:
        return
    told = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
    if forced is None:
        raise UserError(f"{checkpoint} was made by another config ({told}); change run.dir, undo the change, "
                        "or go on with --force")  # fmt: skip
    forced(told)


def _first_line(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


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
