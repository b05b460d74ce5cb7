"""Times every step kind of every method against the bare network evaluations that it needs.

    python -m benchmarks.step [--quick] [--json FILE] [--methods dmd2 consistency] [--networks unet dit]

Both are run in turn in one process on one thread; a figure is the median over the repeats. Overhead is the whole step
(data, noise, losses, clipping, optimizer, averages) over its evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.evaluations import Evaluation, needs, recorded
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
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from fewstep.training.assemble import Sources, assemble
from fewstep.training.loop import TrainState, train

CLASSES = 24


def unet(quick: bool) -> nn.Module:
    """A class-conditional UNet2DModel for 32×32: 6.5 million parameters."""
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
        overhead: seconds over the seconds of its bare evaluations.
        seconds: of the whole step.
        needs: samples through each kind of evaluation.
        saved_bytes: that autograd holds between forward and backward.
    """

    overhead: float
    seconds: float
    needs: dict[str, int]
    saved_bytes: int


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one repeat: only that everything runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--methods", nargs="*", default=None, help="which; all where left out")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for network in arguments.networks:
        for name in arguments.methods or registry.names():
            for turn, figures in measure(name, network, arguments.quick):
                found[f"{network}/{name}/{turn}"] = vars(figures)
                told = ", ".join(f"{count} {kind}" for kind, count in figures.needs.items())
                print(f"{network}/{name}/{turn}: {figures.overhead:.3f} of {figures.seconds:.3f} s, "
                      f"{figures.saved_bytes / 2**20:.0f} MiB saved; {told}", flush=True)  # fmt: skip
    if arguments.json is not None:
        report = {"torch": torch.__version__, "threads": 1, "quick": arguments.quick, "steps": found}
        partial = arguments.json.with_name(f".{arguments.json.name}.partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(arguments.json)


def measure(name: str, network: str, quick: bool) -> Iterator[tuple[str, Figures]]:
    """The figures of each turn that the method takes in its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        state = start(name, network, quick, Path(folder))
        if state is None:
            return
        kinds: dict[str, Figures] = {}
        for step in range(12):
            turn = state.method.turn(step).name
            if turn not in kinds:
                state.step = step
                kinds[turn] = figures_of(state, 1 if quick else 7)
        yield from kinds.items()


def start(name: str, network: str, quick: bool, folder: Path) -> TrainState | None:
    """The method's image config on that network; None for a method that has no such config."""
    torch.manual_seed(0)
    words = ["train.steps=1000000", f"run.dir={folder}", f"data.batch_size={2 if quick else 8}", "student.path=null"]
    words += [f"method.pairs={_pairs(folder)}"] if registry.get(name).claims.pairs else []
    config: RunConfig = load(find(Path(f"emoji32/{name}")), words)
    table = VP(alphas_cumprod({"beta_schedule": "squaredcos_cap_v2"}))
    teacher = make_denoiser(NETWORKS[network](quick), Schedule(table, Kind.V))
    student = teacher.copy() if config.student.lora is None else teacher.lora_view("student", config.student.lora)
    sources = Sources(emoji32(), teacher if config.teacher.path else None, student)
    return assemble(config, sources, Accelerator(cpu=True))


def _pairs(folder: Path) -> Path:
    noise = torch.randn(64, 3, 32, 32)
    path = folder / "pairs.safetensors"
    save_pairs(path, Pair(noise, noise, Condition.of_labels(torch.arange(64) % CLASSES)))
    return path


def figures_of(state: TrainState, repeats: int) -> Figures:
    """One step kind, timed in turn with its evaluations."""
    step, networks = state.step, _networks(state)
    with recorded(networks) as evaluations, _saved() as saved:
        next(train(state))
    steps, bare = [], []
    for _ in range(repeats):
        state.step = step
        steps.append(_timed(lambda: next(train(state))))
        bare.append(_timed(lambda: _again(evaluations)))
    state.step = step
    seconds = statistics.median(steps)
    return Figures(seconds / statistics.median(bare), seconds, needs(evaluations), saved[0])


def _again(evaluations: list[Evaluation]) -> None:
    for one in evaluations:
        one.again()


def _networks(state: TrainState) -> list[nn.Module]:
    """Every network that the method's parts hold, once."""
    found: dict[int, nn.Module] = {}

    def look(value: object, depth: int) -> None:
        if isinstance(value, NetworkDenoiser):
            found[id(value.network)] = value.network
        elif depth and hasattr(value, "__dict__"):
            for inner in vars(value).values():
                look(inner, depth - 1)

    look(state.method, 4)
    return list(found.values())


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _saved:
    """Bytes that autograd packs away inside, each storage once."""

    def __enter__(self) -> list[int]:
        self._total, self._seen = [0], set[int]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._total[0] += storage.nbytes()
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self._total

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


if __name__ == "__main__":
    main()
