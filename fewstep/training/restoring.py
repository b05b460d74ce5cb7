"""Reading checkpoints back: all of one into a run, or only an average."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import RunError, UserError
from fewstep.models.players import Average
from fewstep.models.shards import box, local
from fewstep.rng import RngState
from fewstep.training.differences import differences
from fewstep.training.integrity import Damaged, check, files_of, read_facts, verified
from fewstep.training.loop import TrainState
from fewstep.training.optim import PlayerOptimizer
from fewstep.training.processes import told_by_all
from fewstep.training.retention import list_checkpoints
from fewstep.training.tensor_files import Stored, opened

RNG = "rng"


def restore_last(
    folder: Path, state: TrainState, warn: Callable[[str], None], forced: Callable[[str], None] | None = None
) -> Path | None:
    """Restore the newest checkpoint of a folder that is whole, telling of those that are not; None where there is none.

    Raises:
        UserError: there are checkpoints and all are damaged, or as for `restore`.
        RunError: the processes do not see the same checkpoints.
    """
    found = list_checkpoints(folder)
    names = told_by_all(json.dumps([one.name for one in found]), state.accelerator.device)
    if len(set(names)) > 1:
        last = found[-1].name if found else "none"
        raise RunError(f"run.dir: not every process finds the same checkpoints in {folder.parent} (here {last}); all "
                       "machines must see one folder")  # fmt: skip
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

    All processes call. Each reads what it keeps, of files that may be cut for another number of processes.

    Args:
        checkpoint: the folder.
        state: of any number of processes, whatever number wrote the checkpoint.
        forced: go on though the run's config differs, and tell this of it; None refuses.

    Raises:
        Damaged: a file is not what was written, whichever process sees it.
        UserError: the run's config differs where it decides the result, or it has other tensors or another device.
    """
    facts = verified(checkpoint, state.accelerator.device)
    _refuse_other_device(checkpoint, facts.get("device"), state.accelerator.device.type)
    _compare(checkpoint, differences(facts["config"], state), forced)
    _refuse_other_moments(checkpoint, facts["config"]["optim"].get("kind", "adamw"), state.config.optim.kind)
    players, averages = state.method.players, state.method.averages
    targets = {f"player-{name}": dict(player.parameters) for name, player in players.items()}
    targets |= {f"average-{name}": dict(average.shadow) for name, average in averages.items()}
    for name in (*targets, *(f"optimizer-{name}" for name in players)):
        _refuse_other_tensors(checkpoint, facts, name, targets.get(name))
    for name, target in targets.items():
        with _stored(checkpoint, facts, name) as stored:
            _fill(stored, target)
    for name, optimizer in state.optimizers.items():
        with _stored(checkpoint, facts, f"optimizer-{name}") as stored:
            _restore_optimizer(optimizer, stored)
        optimizer.skips.restore(*facts.get("skips", {}).get(name, (0, 0)))
    for name, average in averages.items():
        average.updates = facts["updates"][name]
    with _stored(checkpoint, facts, RNG) as stored:
        state.rng.restore(RngState(stored.read("device"), stored.read("host")))
    state.loader.position = facts["samples"]
    state.step = facts["step"]


def load_average(checkpoint: Path, name: str, average: Average) -> None:
    """Only one average of a checkpoint, for sampling and export.

    Raises:
        Damaged: a file of it is not what was written.
    """
    facts, name = read_facts(checkpoint), f"average-{name}"
    for file in files_of(facts, name):
        check(checkpoint, facts, file)
    with _stored(checkpoint, facts, name) as stored:
        _fill(stored, average.shadow)


def _stored(checkpoint: Path, facts: Mapping[str, Any], name: str) -> AbstractContextManager[Stored]:
    return opened([checkpoint / file for file in files_of(facts, name)])


@torch.no_grad()
def _fill(stored: Stored, targets: Mapping[str, Tensor]) -> None:
    """Copy stored tensors, one at a time, into those of the same names: all of each, or this process's part."""
    for name, target in targets.items():
        local(target).copy_(stored.read(name, box(target)))


def _restore_optimizer(optimizer: PlayerOptimizer, stored: Stored) -> None:
    """Moments in the memory layout of their parameter: another one would take another kernel, and round differently."""
    state = optimizer.adamw.state
    state.clear()
    for key, shape in stored.shapes.items():
        kind, name = key.split("/", 1)
        leaf, parameter = optimizer.leaves[name], optimizer.player.parameters[name]
        if kind == "step" or shape != tuple(parameter.shape):
            value = stored.read(key).to(leaf.device)  # a step, where the fused kernel counts
            value = value if value.is_floating_point() else int(value)  # as bitsandbytes counts
        else:
            part = stored.read(key, box(parameter))
            dtype = leaf.dtype if part.is_floating_point() else part.dtype  # a forced change of precision
            value = torch.empty_like(leaf, dtype=dtype, requires_grad=False).copy_(part)
        state[leaf][kind] = value


def _refuse_other_tensors(
    checkpoint: Path, facts: Mapping[str, Any], name: str, targets: Mapping[str, Tensor] | None
) -> None:
    """Nothing may be copied before all of it is known to fit; None: whatever is there does."""
    files = files_of(facts, name)
    if not files:
        raise UserError(f"{checkpoint}: made by a run without {name.replace('-', ' ', 1)}; change run.dir")
    if targets is None:
        return
    with _stored(checkpoint, facts, name) as stored:
        shapes = stored.shapes
    ours = {key: tuple(value.shape) for key, value in targets.items()}
    other = sorted(key for key in {*shapes, *ours} if shapes.get(key) != ours.get(key))
    if other:
        there, here = shapes.get(other[0], "missing"), ours.get(other[0], "missing")
        place = checkpoint / (files[0] if len(files) == 1 else name)
        raise UserError(f"{place}: {other[0]} is {there}, in this run {here}; such a change needs another run.dir")


def _refuse_other_moments(checkpoint: Path, was: str, now: str) -> None:
    """An optimizer cannot go on from moments of another form."""
    if (was == "adamw") != (now == "adamw"):
        raise UserError(f"{checkpoint}: optim.kind was {was}, is {now}, which keeps its moments in another form; such "
                        "a change needs another run.dir")  # fmt: skip


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
