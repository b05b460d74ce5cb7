"""What training costs on one CUDA device, in nine minutes.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--tiny] [--sections steps lora ...] [--train]

Sections: `steps` (every turn of DMD2 and of consistency on the shapes of SD1.5, SDXL, DiT-XL/2 and Flux's blocks,
eager and compiled: images per second, model FLOPs utilisation, peak memory, host synchronisations, overhead), `lora`
(adapters on one base against three copies), `attention` (each kernel that loads), `jvp` (against a central difference).
Each has its share of the time; what it did not reach is listed under `not_reached`. `--train` uses the time for emoji
teachers and students instead. `--tiny` runs all of it on small networks, on a CPU too, to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evaluations import module_of, recorded
from benchmarks.shapes import SHAPES, Endless, Shape
from benchmarks.step import parts_of, surroundings, write
from fewstep import registry
from fewstep.config_file import parse
from fewstep.diffusion.derivative import along
from fewstep.errors import UserError
from fewstep.models.attention import set_attention
from fewstep.models.guidance import Guided
from fewstep.rng import Rng
from fewstep.training.loop import TrainState, train
from fewstep.training.method import Setup
from fewstep.training.networks import prepare_networks
from fewstep.training.optim import make_optimizers
from fewstep.training.sharding import denoisers

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bfloat16 operations per second, from the makers' data sheets."""

METHODS: Mapping[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2", "critic_updates": 1},
    "consistency": {"name": "consistency"},
}


@dataclass
class Section:
    """Figures by name, and what the time did not reach."""

    ends: float
    figures: dict[str, Any] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)

    def measure(self, name: str, call: Callable[[], Any]) -> None:
        """Note down what the call returns, or in a line why it did not; or that the time was over."""
        if time.monotonic() > self.ends:
            self.not_reached.append(name)
            return
        try:
            self.figures[name] = call()
        except (UserError, RuntimeError, NotImplementedError, ImportError) as error:
            self.figures[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{name}: {self.figures[name]}", flush=True)


@dataclass(frozen=True)
class Bench:
    """Where and how it runs.

    Attributes:
        device: of everything.
        tiny: small networks and one repeat.
    """

    device: torch.device
    tiny: bool

    @property
    def repeats(self) -> int:
        """Of each measurement."""
        return 1 if self.tiny else 5

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of the call's time on the device, after one that warms it up."""
        call()
        found = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Start measuring memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Most memory since then; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def syncs(self, call: Callable[[], object]) -> int | None:
        """How often the host waits in the call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in told)

    def autocast(self) -> Any:
        """bfloat16 where weights are float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def utilisation(self, flops: int, seconds: float) -> float | None:
        """The share of the device's peak; None for a device that is not in the table."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        peak = next((value for key, value in PEAK.items() if key in name), None)
        return None if peak is None else flops / seconds / peak


def state_of(bench: Bench, shape: Shape, method: Mapping[str, Any], compiled: str, lora: int | None) -> TrainState:
    """A method on random networks of a shape, as a run's state."""
    size = 2 if bench.tiny else shape.batch
    fake = {"fake_score_lora": lora} if lora and method["name"] == "dmd2" else {}
    run = parse(
        {
            "run": {"dir": "benchmark"},
            "teacher": {"path": "random"},
            "method": {**method, **fake},
            "data": {"batch_size": size},
            "train": {"steps": 1000, "compile": compiled, "precision": "bf16"},
        }
    )
    teacher = shape.denoiser(bench.tiny, bench.device)
    student = teacher.copy() if lora is None else teacher.lora_view("student", lora)
    example = shape.example(size, bench.tiny)
    setup = Setup(student, teacher, Guided(teacher, None), 1, 1000, shape.example(1, bench.tiny).to(bench.device))
    made = registry.get(run.method.name)(run.method, setup)
    prepare_networks(run, made.players, denoisers((teacher, *vars(made).values())), bench.device)
    accelerator = Accelerator(mixed_precision="bf16" if bench.device.type == "cuda" else "no")
    optimizers = make_optimizers(made.players, run.optim)
    return TrainState(run, made, optimizers, Endless(example), Rng(0, bench.device), accelerator)  # pyright: ignore[reportArgumentType]


def turn_figures(bench: Bench, state: TrainState, step: int) -> dict[str, Any]:
    """One turn: its speed and memory, beside those of its network evaluations alone."""
    batch = len(next(iter(state.loader)).x)
    parts = parts_of(state)
    state.step = step

    def whole() -> None:
        state.step = step
        next(train(state))

    whole()
    with recorded(parts) as evaluations:
        whole()

    def bare() -> None:
        with bench.autocast():
            for one in evaluations:
                one.again()

    with FlopCounterMode(display=False) as counter:
        bare()
    bench.forget_peak()
    seconds = bench.seconds(whole)
    return {
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "overhead_over_evaluations": seconds / bench.seconds(bare),
        "mfu": bench.utilisation(counter.get_total_flops(), seconds),
        "peak_bytes": bench.peak_bytes(),
        "host_syncs": bench.syncs(whole),
        "parameters": sum(p.numel() for p in module_of(parts[0]).parameters()),
    }


def turns(bench: Bench, shape: Shape, method: str, compiled: str, lora: int | None) -> dict[str, Any]:
    """Every kind of turn of a method."""
    state = state_of(bench, shape, METHODS[method], compiled, lora)
    kinds = {state.method.turn(step).name: step for step in reversed(range(4))}
    return {name: turn_figures(bench, state, step) for name, step in kinds.items()}


def steps(bench: Bench, section: Section) -> None:
    """Eager first on every shape, then compiled, which tiny networks are not worth."""
    for compiled in ("none",) if bench.tiny else ("none", "blocks"):
        for name, shape in SHAPES.items():
            for method in METHODS:
                where = f"{name}/{method}/{'eager' if compiled == 'none' else 'compiled'}"
                call = _bound(turns, bench, shape, method, compiled, 4 if bench.tiny and shape.lora else shape.lora)
                section.measure(where, call)


def lora(bench: Bench, section: Section) -> None:
    """DMD2's three networks as copies, and as adapters on one base."""
    for name, rank in (("three copies", None), ("adapters", 4 if bench.tiny else 64)):
        section.measure(name, _bound(turns, bench, SHAPES["sd15"], "dmd2", "none", rank))


def attention(bench: Bench, section: Section) -> None:
    """Forward and backward pass of one network with each kernel."""
    for name in ("sd15", "flux_blocks"):
        for kernel in ("auto", "sdpa", "flash", "sage", "xformers"):
            section.measure(f"{name}/{kernel}", _bound(_with_kernel, bench, SHAPES[name], kernel))


def _with_kernel(bench: Bench, shape: Shape, kernel: Any) -> dict[str, Any]:
    made = shape.denoiser(bench.tiny, bench.device)
    set_attention(made.network, kernel, bench.device)
    made.network.requires_grad_(True)
    batch = shape.example(2 if bench.tiny else shape.batch, bench.tiny).to(bench.device)
    t = made.process.times(0.5 * made.process.t_max, batch.x)

    def call() -> None:
        with bench.autocast():
            made(batch.x, t, batch.condition).value.float().sum().backward()
        made.network.zero_grad(set_to_none=True)

    bench.forget_peak()
    return {"seconds": bench.seconds(call), "peak_bytes": bench.peak_bytes()}


def jvp(bench: Bench, section: Section) -> None:
    """A derivative along (x, t) by both ways."""
    for name in ("sd15", "dit_xl_2", "flux_blocks"):
        section.measure(name, _bound(_derivatives, bench, SHAPES[name]))


def _derivatives(bench: Bench, shape: Shape) -> dict[str, Any]:
    made = shape.denoiser(bench.tiny, bench.device)
    batch = shape.example(2, bench.tiny).to(bench.device)
    t = made.process.times(0.5 * made.process.t_max, batch.x)
    direction, step = (torch.ones_like(batch.x), torch.ones_like(t)), 1e-4 * made.process.t_max
    out: dict[str, Any] = {}
    slopes = {}
    for how in ("jvp", "central_difference"):

        def call(how: Any = how) -> None:
            slopes[how] = along(
                lambda x, s: made(x, s, batch.condition).value, (batch.x, t), direction, how, step
            ).slope

        bench.forget_peak()
        out[how] = {"seconds": bench.seconds(call), "peak_bytes": bench.peak_bytes()}
    gap = (slopes["jvp"] - slopes["central_difference"]).norm() / slopes["jvp"].norm()
    return {**out, "relative_difference": float(gap)}


def trained(out: Path, section: Section, tiny: bool) -> None:
    """A teacher of the emoji, then every student of the leaderboard, and their table. A run that is cut short saves."""
    words = ["train.steps=2", "train.sample_every=0", "data.batch_size=4"] if tiny else []
    names = ["dmd2"] if tiny else [name for name in registry.names() if not registry.get(name).claims.pairs]
    for name in sorted(names, key=lambda name: registry.get(name).needs_teacher):
        command = ["train", f"emoji32/{name}", f"run.dir={out / 'runs' / name}", *words]
        section.measure(f"train {name}", _bound(_command, command, section.ends))
    done = [str(path.parent) for path in sorted(out.glob("runs/*/config.json"))]
    if done and not tiny:
        section.measure("report", _bound(_command, ["report", *done, "--out", str(out / "report")], section.ends + 60))


def _command(words: list[str], ends: float) -> dict[str, Any]:
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fewstep", *words], stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=max(ends - start, 1))
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves where it is
        _, err = process.communicate()
    return {"seconds": time.monotonic() - start, "code": process.returncode, "last": err.strip()[-200:]}


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


SECTIONS: Mapping[str, tuple[Callable[[Bench, Section], None], float]] = {
    "steps": (steps, 0.6),
    "lora": (lora, 0.15),
    "attention": (attention, 0.15),
    "jvp": (jvp, 0.1),
}
"""Each with its share of the time; what one leaves, the next may use."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, and for runs with --train")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="small networks, on a CPU too: only that everything runs")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--train", action="store_true", help="train emoji teachers and students instead")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        parser.error("no CUDA device; --tiny runs on a CPU, to see that everything runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun, bench = time.monotonic(), Bench(device, arguments.tiny)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {**surroundings(), "clock": "wall", "device": name, "tiny": arguments.tiny, "sections": {}}
    ends = begun
    for title in ["train"] if arguments.train else arguments.sections:
        share = 1.0 if title == "train" else SECTIONS[title][1]
        ends += share * 60 * arguments.minutes * 0.95  # what is under way when time is over is finished
        section = Section(ends)
        if title == "train":
            trained(arguments.out, section, arguments.tiny)
        else:
            SECTIONS[title][0](bench, section)
        report["sections"][title] = {"figures": section.figures, "not_reached": section.not_reached}
        report["seconds"] = time.monotonic() - begun
        write(arguments.out / "gpu.json", report)


if __name__ == "__main__":
    main()
