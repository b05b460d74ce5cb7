"""What may differ between a run and the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import isfunction
from typing import Any

from fewstep.config_file import flat, parse
from fewstep.training.loop import TrainState
from fewstep.training.method import Method

STEPS = "train.steps"
_FREE_TO_CHANGE = (
    "run.dir",
    STEPS,
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.log_every",
    "train.sample_every",
    "train.sample_prompts",
    "train.max_bad_steps",
    "train.resume",
    "train.threads",
    "train.accumulate",
    "train.shard",
    "train.trackers",
    "memory.checkpoint",
    "memory.offload",
    "memory.encoders",
    "data.workers",
)
_FREE_SECTIONS = ("health.", "evaluate.")  # they look on


def differences(saved: Mapping[str, Any], state: TrainState) -> list[str]:
    """What decides the result and is another than in a checkpoint's config, a phrase each."""
    old, new = flat(parse(saved)), flat(state.config)
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and not _is_free(key, state)]
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in different]


def _is_free(key: str, state: TrainState) -> bool:
    if key == STEPS:
        return not depends_on_its_length(state)
    return key in _FREE_TO_CHANGE or key.startswith(_FREE_SECTIONS)


def depends_on_its_length(state: TrainState) -> bool:
    """Whether another number of steps makes another run from its first step on.

    So it is where the learning rate decays, where the run has stages, and where the method reads how long the run is.
    """
    return (
        state.config.optim.decay != "constant"
        or state.method.turn(0).stage is not None
        or reads_the_length(type(state.method))
    )


def reads_the_length(method: type[Method]) -> bool:
    """Whether a method's own functions read `Setup.run_steps`."""
    return any("run_steps" in one.__code__.co_names for one in vars(method).values() if isfunction(one))
