"""Times every step kind of every method against the bare network evaluations that it needs.

    python -m benchmarks.step [--quick] [--json FILE] [--methods dmd2 consistency] [--networks unet dit]

Both are run in turn in one process on one thread, and timed by the CPU seconds of the process, which other programs on
the machine disturb least. Every repeat makes the same random draws. Overhead is the whole step (data, noise, losses,
clipping, optimizer, averages, all of it) over the bare work: the step's evaluations by themselves, with a plain sum as
the loss, and torch's fused AdamW on the players that move. It is the median over pairs of the two, in changing order.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.evaluations import Evaluation, module_of, needs, recorded, saved
from fewstep import registry
from fewstep.commands.configs import find
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.data.emoji import emoji32
from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.heads import Heads
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from fewstep.training.assemble import assemble
from fewstep.training.host_memory import keep_freed_memory
from fewstep.training.loop import TrainState, train
from fewstep.training.opening import Sources

CLASSES = 24
STEPS = 1_000_000


def unet(quick: bool) -> nn.Module:
    """A class-conditional UNet2DModel for 32×32: 6.8 million parameters."""
    from diffusers import UNet2DModel

    widths = (8, 8) if quick else (64, 128, 128)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=1 if quick else 2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(widths) - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
        attention_head_dim=8 if quick else 32,
        num_class_embeds=CLASSES + 1,
    )


def dit(quick: bool) -> nn.Module:
    """A DiTTransformer2DModel for 32×32: 4.6 million parameters."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        patch_size=8 if quick else 2,
        num_layers=1 if quick else 6,
        num_attention_heads=2 if quick else 4,
        attention_head_dim=8 if quick else 48,
        num_embeds_ada_norm=CLASSES,
    )


NETWORKS: Mapping[str, Callable[[bool], nn.Module]] = {"unet": unet, "dit": dit}


@dataclass(frozen=True)
class Figures:
    """Of one step kind.

    Attributes:
        overhead: seconds over the seconds of the bare work, evaluations and optimizer.
        lowest: of the repeats.
        highest: of the repeats.
        over_evaluations: seconds over those of the evaluations alone.
        seconds: of the whole step.
        needs: samples through each kind of evaluation.
        saved_bytes: that autograd holds between forward and backward.
        needed_bytes: that it holds for the evaluations by themselves.
    """

    overhead: float
    lowest: float
    highest: float
    over_evaluations: float
    seconds: float
    needs: dict[str, int]
    saved_bytes: int
    needed_bytes: int


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one repeat: only that everything runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--methods", nargs="*", default=None, help="which; all where left out")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=7, help="pairs of a step and its bare work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    repeats = 1 if arguments.quick else arguments.repeats
    report = {**surroundings(), "quick": arguments.quick, "repeats": repeats, "steps": {}}
    for network in arguments.networks:
        for name in arguments.methods or registry.names():
            for turn, figures in measure(name, network, arguments.quick, repeats):
                report["steps"][f"{network}/{name}/{turn}"] = asdict(figures)
                print(f"{network}/{name}/{turn}: {line(figures)}", flush=True)
            gc.collect()  # a run's networks point at each other, and would wait for the next collection
            if arguments.json is not None:  # after each method: what is there is kept, whatever comes
                write(arguments.json, report)


def line(figures: Figures) -> str:
    """The figures for people."""
    told = ", ".join(f"{count} {kind}" for kind, count in figures.needs.items())
    return (
        f"{figures.overhead:.3f} ({figures.lowest:.3f} to {figures.highest:.3f}) of {figures.seconds:.3f} s, "
        f"{figures.saved_bytes / 2**20:.1f} MiB saved of {figures.needed_bytes / 2**20:.1f} needed; {told}"
    )


def surroundings() -> dict[str, object]:
    """What figures depend on besides the code."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds of the process",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((one.split(":", 1)[1].strip() for one in lines if one.startswith("model name")), platform.machine())


def write(path: Path, report: dict[str, object]) -> None:
    """The figures as JSON, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def measure(name: str, network: str, quick: bool, repeats: int) -> Iterator[tuple[str, Figures]]:
    """The figures of each turn that the method takes in its first or last steps."""
    with tempfile.TemporaryDirectory() as folder:
        state = start(name, network, quick, Path(folder))
        kinds: set[str] = set()
        for step in (*range(12), *range(STEPS - 12, STEPS)):
            turn = state.method.turn(step).name
            if turn not in kinds:
                kinds.add(turn)
                state.step = step
                yield turn, figures_of(state, repeats)


def start(name: str, network: str, quick: bool, folder: Path) -> TrainState:
    """The method's image config on that network."""
    torch.manual_seed(0)
    words = [f"train.steps={STEPS}", f"run.dir={folder}", f"data.batch_size={2 if quick else 8}", "student.path=null"]
    words += [f"method.pairs={_pairs(folder)}"] if registry.get(name).claims.pairs else []
    config: RunConfig = load(find(Path(f"emoji32/{name}")), words)
    table = VP(alphas_cumprod({"beta_schedule": "squaredcos_cap_v2"}))
    teacher = make_denoiser(NETWORKS[network](quick), Schedule(table, Kind.V))
    student = teacher.copy() if config.student.lora is None else teacher.lora_view("student", config.student.lora)
    sources = Sources(emoji32(), teacher if config.teacher.path else None, student)
    return assemble(config, sources, Accelerator(cpu=True))


def _pairs(folder: Path) -> str:
    noise = torch.randn(64, 3, 32, 32)
    path = folder / "pairs.safetensors"
    save_pairs(path, Pair(noise, noise.clone(), Condition.of_labels(torch.arange(64) % CLASSES)))
    return str(path)


def figures_of(state: TrainState, repeats: int) -> Figures:
    """One step kind, timed in turn with its evaluations and its optimizer."""
    step, parts, drawn = state.step, parts_of(state), state.rng.state()
    own = [module_of(part) for part in parts]
    with recorded(parts) as evaluations, saved(own) as held:
        next(train(state))
    optimizers = [_bare_optimizer(state, name) for name in state.method.turn(step).trains]
    needed = _bytes_of(evaluations, own)

    def whole() -> None:
        state.step = step
        next(train(state))

    work = (whole, lambda: [one.again() for one in evaluations], lambda: [one() for one in optimizers])
    state.rng.restore(drawn)
    for call in work:
        call()
    rows = []
    for repeat in range(repeats):
        order = (0, 1, 2) if repeat % 2 else (1, 2, 0)
        state.rng.restore(drawn)  # or a rollout would be of another length than the one recorded
        seconds = {i: _timed(work[i]) for i in order}
        rows.append([seconds[i] for i in range(3)])
    state.step = step
    ratios = [one / (bare + optimizer) for one, bare, optimizer in rows]
    alone = statistics.median(one / bare for one, bare, _ in rows)
    seconds = statistics.median(one for one, _, _ in rows)
    overhead = statistics.median(ratios)
    return Figures(overhead, min(ratios), max(ratios), alone, seconds, needs(evaluations), held[0], needed)


def _bytes_of(evaluations: list[Evaluation], own: list[nn.Module]) -> int:
    """What their forward passes hold for the backward pass, all at once."""
    with saved(own) as held:
        kept = [one.results() for one in evaluations if one.trained]
    del kept
    return held[0]


def _bare_optimizer(state: TrainState, name: str) -> Callable[[], None]:
    """A fused AdamW of torch on one player, which leaves the weights where they are: its rate is zero."""
    parameters = list(state.method.players[name].parameters.values())
    gradients = [torch.randn_like(p) for p in parameters]
    adamw = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def parts_of(state: TrainState) -> list[NetworkDenoiser | Heads]:
    """Every denoiser and every set of heads that the method's parts hold, once."""
    found: dict[int, NetworkDenoiser | Heads] = {}

    def look(value: object, depth: int) -> None:
        if isinstance(value, NetworkDenoiser | Heads):
            found[id(value)] = value
        elif depth and hasattr(value, "__dict__"):
            for inner in vars(value).values():
                look(inner, depth - 1)

    look(state.method, 4)
    return list(found.values())


def _timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
