"""Times whole training steps as they are written, with compiled blocks, and with compiled networks, in turn.

    python -m benchmarks.compiled [--quick] [--json FILE] [--methods scm flow_map] [--networks dit unet]

One run of each kind in one process on one thread. `step` is the median of a step's CPU seconds over those of the step
as written, `derivative` the same of a forward derivative of the student along a sample and its time, without a graph,
and `first` the wall seconds of the first step, which compiles.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import NETWORKS, parts_of, start, surroundings, write
from fewstep import registry
from fewstep.diffusion.derivative import along
from fewstep.models.compile import Mode, compile_network
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training.host_memory import keep_freed_memory
from fewstep.training.loop import TrainState, train

MODES: tuple[Mode, ...] = ("none", "blocks", "whole")
DERIVED = ("scm", "meanflow", "flow_map")
"""Whose steps take a forward derivative of the student."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one repeat: only that everything runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--methods", nargs="*", default=list(DERIVED), choices=registry.names())
    parser.add_argument("--networks", nargs="*", default=["dit"], choices=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    report: dict[str, Any] = {**surroundings(), "quick": arguments.quick, "repeats": arguments.repeats, "steps": {}}
    for network in arguments.networks:
        for method in arguments.methods:
            figures = measure(method, network, arguments.quick, 1 if arguments.quick else arguments.repeats)
            report["steps"][f"{network}/{method}"] = figures
            for mode, told in figures.items():
                print(f"{network}/{method}/{mode}: " + ", ".join(f"{k} {v:.3f}" for k, v in told.items()), flush=True)
            if arguments.json is not None:
                write(arguments.json, report)
            torch.compiler.reset()
            gc.collect()


def measure(method: str, network: str, quick: bool, repeats: int) -> Mapping[str, dict[str, float]]:
    """The seconds of a step, what share of those as it is written, and the same share of a derivative, by kind."""
    with tempfile.TemporaryDirectory() as folder:
        states = {mode: _compiled(start(method, network, quick, Path(folder)), mode) for mode in MODES}
        steps = {mode: partial(_step, state) for mode, state in states.items()}
        derivatives = {mode: partial(_derivative, state) for mode, state in states.items()}
        first = {mode: _timed(step, time.perf_counter) for mode, step in steps.items()}
        for derivative in derivatives.values():
            derivative()
        of_steps, of_derivatives = _in_turn(steps, repeats), _in_turn(derivatives, repeats)
    return {
        mode: {
            "step": _share(of_steps, mode),
            "derivative": _share(of_derivatives, mode),
            "seconds": statistics.median(of_steps[mode]),
            "first": first[mode],
        }
        for mode in MODES
    }


def _in_turn(calls: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(repeats):
        for mode in MODES if repeat % 2 else reversed(MODES):
            seconds[mode].append(_timed(calls[mode]))
    return seconds


def _share(seconds: Mapping[str, list[float]], mode: str) -> float:
    return statistics.median(one / plain for one, plain in zip(seconds[mode], seconds["none"], strict=True))


def _compiled(state: TrainState, mode: Mode) -> TrainState:
    denoisers = {id(part.network): part for part in parts_of(state) if isinstance(part, NetworkDenoiser)}
    for denoiser in denoisers.values():
        compile_network(denoiser, mode)
    return state


def _step(state: TrainState) -> None:
    """The same one each time: a method that takes turns would need a time for each."""
    state.step = 0
    next(train(state))


def _derivative(state: TrainState) -> None:
    """Of the student, along ones, beside the middle of its times."""
    student, batch = state.method.student, state.next_batch()
    t = student.process.times(0.5 * student.process.t_max, batch.x)
    along(
        lambda x, t: student(x, t, batch.condition).value, (batch.x, t), (torch.ones_like(batch.x), torch.ones_like(t))
    )


def _timed(call: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    begun = clock()
    call()
    return clock() - begun


if __name__ == "__main__":
    main()
