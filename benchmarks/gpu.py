"""What training costs on one CUDA device, in nine minutes.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--tiny] [--sections eager lora ...] [--train]

Sections: `eager` (every turn of DMD2 and of consistency on the shapes of SD1.5, SDXL, DiT-XL/2 and Flux's blocks:
images per second, model FLOPs utilisation, peak memory, host synchronisations, overhead), `lora` (adapters on one base
against three copies), `precision` (bf16 against bf16_weights), `graphs` (a small network eager, compiled, and as a
recorded graph), `attention` (each kernel that loads), `jvp` (against a central difference), `compiled` (as `eager`,
with compiled blocks). Each has its share of the time, and leaves the rest of it to the next; what it did not reach is
listed under `not_reached`, and what failed has a line under `error`. `--train` uses the time for emoji teachers and
students instead. `--tiny` runs all of it on small networks, on a CPU too, to see that it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_clock import Bench, Section, told
from benchmarks.gpu_networks import attention, derivatives
from benchmarks.gpu_steps import compiled, eager, graphs, lora, precision
from benchmarks.gpu_train import trained
from benchmarks.step import surroundings, write

SECTIONS: Mapping[str, tuple[Callable[[Bench, Section], None], float]] = {
    "eager": (eager, 0.3),
    "lora": (lora, 0.08),
    "precision": (precision, 0.08),
    "graphs": (graphs, 0.1),
    "attention": (attention, 0.12),
    "jvp": (derivatives, 0.1),
    "compiled": (compiled, 0.22),
}
"""Each with its share of the time; what one leaves, the next may use. What compiles large networks comes last."""


def main() -> None:
    """The command."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun, bench = time.monotonic(), Bench(device, arguments.tiny)
    final = begun + 60 * arguments.minutes
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {**surroundings(), "clock": "wall", "device": name, "tiny": arguments.tiny, "sections": {}}

    def keep() -> None:
        report["seconds"] = time.monotonic() - begun
        write(arguments.out / "gpu.json", report)

    ends = begun
    for title in ["train"] if arguments.train else arguments.sections:
        share = 1.0 if arguments.train else SECTIONS[title][1] / sum(SECTIONS[t][1] for t in arguments.sections)
        ends += share * (final - begun)
        section = Section(ends, final, keep)
        report["sections"][title] = {"figures": section.figures, "not_reached": section.not_reached}
        try:
            if arguments.train:
                trained(arguments.out, section, arguments.tiny)
            else:
                SECTIONS[title][0](bench, section)
        except Exception as error:  # outside of a measurement; the other sections go on
            report["sections"][title]["error"] = told(error)
        keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, and for runs with --train")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="small networks, on a CPU too: only that everything runs")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--train", action="store_true", help="train emoji teachers and students instead")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        parser.error("no CUDA device; --tiny runs on a CPU, to see that everything runs")
    return arguments


if __name__ == "__main__":
    main()
