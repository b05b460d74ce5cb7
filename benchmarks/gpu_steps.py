"""Training steps on a device: large shapes, eager and compiled, copies and adapters, both kinds of bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluations import module_of, recorded
from benchmarks.gpu_clock import Bench, Section, uncompiled
from benchmarks.shapes import SHAPES, SMALL, Endless, Shape
from benchmarks.step import parts_of
from fewstep import registry
from fewstep.config_file import parse
from fewstep.models.guidance import Guided
from fewstep.rng import Rng
from fewstep.training.loop import TrainState, train
from fewstep.training.method import Setup
from fewstep.training.networks import prepare_networks
from fewstep.training.optim import make_optimizers
from fewstep.training.sharding import denoisers

METHODS: Mapping[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2", "critic_updates": 1},
    "consistency": {"name": "consistency"},
}

_COMPILED_FIRST = ("dit_xl_2", "flux_blocks", "sd15", "sdxl")
"""Blocks that are all alike compile quickest."""


def eager(bench: Bench, section: Section) -> None:
    """Every turn of two methods on every shape."""
    for name, shape in SHAPES.items():
        for method in METHODS:
            section.measure(f"{name}/{method}", partial(_turns, bench, shape, method, "none"))


def compiled(bench: Bench, section: Section) -> None:
    """The same with blocks compiled."""
    with _compiler(bench):
        for name in _COMPILED_FIRST:
            for method in METHODS:
                section.measure(f"{name}/{method}", partial(_turns, bench, SHAPES[name], method, "blocks"))


def lora(bench: Bench, section: Section) -> None:
    """DMD2's three networks as copies, and as adapters on one base."""
    for name, rank in (("three copies", None), ("adapters", 64)):
        section.measure(name, partial(_turns, bench, SHAPES["sd15"], "dmd2", "none", rank=rank))


def precision(bench: Bench, section: Section) -> None:
    """DMD2 on three copies: float32 weights under mixed precision, and weights and moments in bfloat16."""
    for name in ("bf16", "bf16_weights"):
        section.measure(name, partial(_turns, bench, SHAPES["sd15"], "dmd2", "none", rank=None, kept=name))


def graphs(bench: Bench, section: Section) -> None:
    """A network so small that starting its kernels takes longer than they do."""
    with _compiler(bench):
        for mode in ("none", "whole", "graphs"):
            section.measure(mode, partial(_bare_turns, bench, mode))


def _compiler(bench: Bench) -> AbstractContextManager[object]:
    """Tiny networks go through everything but the compiler, which would take minutes."""
    return torch.compiler.set_stance("force_eager") if bench.tiny else nullcontext()


def state_of(
    bench: Bench, shape: Shape, method: Mapping[str, Any], mode: str, rank: int | None, kept: str = "bf16"
) -> TrainState:
    """A method on random networks of a shape, as a run's state.

    Args:
        bench: where.
        shape: of the networks.
        method: its config.
        mode: how networks are compiled.
        rank: of adapters on one base; None: copies.
        kept: the run's precision.
    """
    size, rank = (2, None if rank is None else 4) if bench.tiny else (shape.batch, rank)
    fake = {"fake_score_lora": rank} if rank and method["name"] == "dmd2" else {}
    run = parse(
        {
            "run": {"dir": "benchmark"},
            "teacher": {"path": "random"},
            "method": {**method, **fake},
            "data": {"batch_size": size},
            "train": {"steps": 1000, "compile": mode, "precision": kept},
        }
    )
    teacher = shape.denoiser(bench.tiny, bench.device)
    student = teacher.copy() if rank is None else teacher.lora_view("student", rank)
    example = shape.example(size, bench.tiny)
    setup = Setup(student, teacher, Guided(teacher, None), 1, 1000, shape.example(1, bench.tiny).to(bench.device))
    made = registry.get(run.method.name)(run.method, setup)
    held = list(denoisers((teacher, *vars(made).values())))
    prepare_networks(run, made.players, held, bench.device, made.averages.values())
    accelerator = Accelerator(mixed_precision="bf16" if bench.on_gpu else "no")
    rng = Rng(0, bench.device)
    optimizers = make_optimizers(made.players, run.optim, rng)
    return TrainState(run, made, optimizers, Endless(example), rng, accelerator)  # pyright: ignore[reportArgumentType]


def _turns(
    bench: Bench, shape: Shape, method: str, mode: str, rank: int | str | None = "shape", kept: str = "bf16"
) -> dict[str, Any]:
    """Every kind of turn of a method; adapters of the shape's own rank where none is told."""
    own = shape.lora if isinstance(rank, str) else rank
    state = state_of(bench, shape, METHODS[method], mode, own, kept)
    return {name: _turn_figures(bench, state, step) for name, step in _kinds(state).items()}


def _kinds(state: TrainState) -> dict[str, int]:
    """The first step of each kind of turn."""
    return {state.method.turn(step).name: step for step in reversed(range(4))}


def _turn_figures(bench: Bench, state: TrainState, step: int) -> dict[str, Any]:
    """One turn: its speed and memory, beside those of its network evaluations alone."""
    parts = parts_of(state)
    whole = partial(_step, state, step)
    whole()
    with recorded(parts) as evaluations:
        whole()

    def bare() -> None:
        with bench.autocast():
            for one in evaluations:
                one.again()

    found = bench.seconds_and_peak(whole)
    with uncompiled(), FlopCounterMode(display=False) as counter:
        bare()
    batch = len(next(iter(state.loader)).x)
    return {
        **found,
        "images_per_second": batch / found["seconds"],
        "overhead_over_evaluations": found["seconds"] / bench.seconds(bare),
        "mfu": bench.utilisation(counter.get_total_flops(), found["seconds"]),
        "host_syncs": bench.syncs(whole),
        "parameters": sum(p.numel() for p in module_of(parts[0]).parameters()),
    }


def _bare_turns(bench: Bench, mode: str) -> dict[str, Any]:
    """Turns of DMD2 on the small network; hooks that would note its evaluations would be compiled with it."""
    state = state_of(bench, SMALL, METHODS["dmd2"], mode, None)
    figures = {}
    for name, step in _kinds(state).items():
        for _ in range(1 if bench.tiny else 4):  # compile, warm up and record
            _step(state, step)
        found = bench.seconds_and_peak(partial(_step, state, step))
        rate = len(next(iter(state.loader)).x) / found["seconds"]
        figures[name] = {**found, "images_per_second": rate, "host_syncs": bench.syncs(partial(_step, state, step))}
    return figures


def _step(state: TrainState, step: int) -> None:
    state.step = step
    next(train(state))
