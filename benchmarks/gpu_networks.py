"""Single networks on a device: kernels of attention, and derivatives by both ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_clock import Bench, Section, told
from benchmarks.shapes import SHAPES, Shape
from fewstep.diffusion.derivative import along
from fewstep.models.attention import set_attention
from fewstep.models.compile import compile_network

KERNELS = ("auto", "flash", "sage", "xformers", "sdpa")
"""torch's own comes last: diffusers keeps the choice for the process, and the sections that follow are to have it."""

COMPILED = "jvp, compiled blocks"


def attention(bench: Bench, section: Section) -> None:
    """A network's forward pass, and forward and backward pass, with each kernel."""
    for name in ("sd15", "flux_blocks"):
        for kernel in KERNELS:
            section.measure(f"{name}/{kernel}", partial(_with_kernel, bench, SHAPES[name], kernel))


def _with_kernel(bench: Bench, shape: Shape, kernel: Any) -> dict[str, Any]:
    made = shape.denoiser(bench.tiny, bench.device)
    set_attention(made.network, kernel, bench.device)
    batch = shape.example(2 if bench.tiny else shape.batch, bench.tiny).to(bench.device)
    t = made.process.times(0.5 * made.process.t_max, batch.x)

    def forward() -> torch.Tensor:
        with bench.autocast():
            return made(batch.x, t, batch.condition).value

    def both() -> None:
        forward().float().sum().backward()
        made.network.zero_grad(set_to_none=True)

    with torch.no_grad():
        found: dict[str, Any] = {"forward": bench.seconds_and_peak(forward)}
    made.network.requires_grad_(True)
    try:
        found["forward and backward"] = bench.seconds_and_peak(both)
    except (RuntimeError, NotImplementedError) as error:  # some kernels are made for sampling alone
        found["forward and backward"] = {"error": told(error)}
    return found


def derivatives(bench: Bench, section: Section) -> None:
    """A derivative along (x, t): forward mode, a difference, and forward mode with compiled blocks."""
    for name in ("sd15", "dit_xl_2", "flux_blocks"):
        section.measure(name, partial(_derivatives, bench, SHAPES[name]))


def _derivatives(bench: Bench, shape: Shape) -> dict[str, Any]:
    made = shape.denoiser(bench.tiny, bench.device)
    batch = shape.example(2, bench.tiny).to(bench.device)
    t = made.process.times(0.5 * made.process.t_max, batch.x)
    direction, step = (torch.ones_like(batch.x), torch.ones_like(t)), 1e-4 * made.process.t_max
    out: dict[str, Any] = {}
    slopes: dict[str, torch.Tensor] = {}
    for title in ("jvp", "central_difference", COMPILED):
        how: Any = "jvp" if title == COMPILED else title
        if title == COMPILED:
            compile_network(made, "none" if bench.tiny else "blocks")

        def call(title: str = title, how: Any = how) -> None:
            slopes[title] = along(
                lambda x, s: made(x, s, batch.condition).value, (batch.x, t), direction, how, step
            ).slope

        out[title] = bench.seconds_and_peak(call)
    exact = slopes["jvp"]
    gaps = {title: float((slope - exact).norm() / exact.norm()) for title, slope in slopes.items() if title != "jvp"}
    return {**out, "relative_differences": gaps}
