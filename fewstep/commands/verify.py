"""`fewstep verify`: a method against an exact answer, on a mixture whose denoiser is known in closed form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

from fewstep import registry
from fewstep.commands.json_file import require_writable, write_json
from fewstep.commands.verification import Samples, Verdict, verify
from fewstep.diffusion.gaussian import GaussianMixture, five_modes
from fewstep.errors import UserError

MAP_BARS = {1: 0.10, 4: 0.04}
"""Largest mean distance to the exact map that `verify --all` accepts on its one-dimensional mixture, by steps."""


def run(
    name: str | None,
    everything: bool,
    mixture: Path | None,
    steps: int | None,
    seed: int,
    out: Path | None,
    save: Path | None,
) -> None:
    """Verify one method, or all of them, and print the verdicts; exit code 1 if any fails.

    Raises:
        UserError: neither a method nor `--all`, or both, or an option that needs one method.
    """
    require_writable("--json", out)
    require_writable("--save-samples", save)
    target = GaussianMixture.from_json(mixture) if mixture else None
    if everything:
        if name is not None or save is not None:
            raise UserError(f"--all: verifies every method; leave out {'--save-samples' if save else name}")
        verdicts = _every(target, steps, seed)
        passed = all(verdict.passed for verdict in verdicts)
    else:
        if name is None:
            raise UserError(f"verify: a method is missing; registered: {', '.join(registry.names())}; or give --all")
        verdicts = [_one(name, target, steps or registry.get(name).claims.steps[0], seed, save)]
        passed = verdicts[0].passed
    if out is not None:
        write_json(out, {"verdicts": [asdict(v) for v in verdicts]} if everything else asdict(verdicts[0]))
    if not passed:
        raise typer.Exit(1)


def _one(name: str, mixture: GaussianMixture | None, steps: int, seed: int, save: Path | None) -> Verdict:
    ((verdict, samples),) = verify(name, mixture or _default(name), (steps,), seed)
    if save is not None:
        _save(save, samples)
    for key, value in asdict(verdict).items():
        typer.echo(f"{key:<16}{value:.5f}" if isinstance(value, float) else f"{key:<16}{value}")
    return verdict


def _every(mixture: GaussianMixture | None, steps: int | None, seed: int) -> list[Verdict]:
    """All methods at the step counts they claim; methods that promise the flow map on one dimension too."""
    typer.echo(f"{'method':<24}{'D':>3}{'steps':>6}{'student':>10}{'teacher':>10}{'floor':>10}{'map':>8}{'s':>6}")
    verdicts: list[Verdict] = []
    for name, cls in registry.methods().items():
        if not cls.claims.steps:
            continue
        counts = cls.claims.steps if steps is None else (steps,)
        verdicts += _table(name, mixture or _default(name), counts, seed)
        if cls.claims.exact_map and mixture is None:
            verdicts += _table(name, one_dimensional(), [n for n in counts if n in MAP_BARS], seed, MAP_BARS)
    return verdicts


def _table(
    name: str, mixture: GaussianMixture, counts: Sequence[int], seed: int, bars: dict[int, float] | None = None
) -> list[Verdict]:
    found = []
    for verdict, _ in verify(name, mixture, counts, seed):
        if bars is not None and verdict.map_error is not None and verdict.map_error > bars[verdict.steps]:
            verdict = Verdict(**{**asdict(verdict), "passed": False})
        found.append(verdict)
        error = "" if verdict.map_error is None else f"{verdict.map_error:.3f}"
        typer.echo(f"{name:<24}{verdict.dim:>3}{verdict.steps:>6}{verdict.student_energy:>10.5f}"
                   f"{verdict.teacher_energy:>10.5f}{verdict.floor_energy:>10.5f}{error:>8}{verdict.seconds:>6.0f}"
                   f"{'' if verdict.passed else '  FAILED'}")  # fmt: skip
    return found


def _default(name: str) -> GaussianMixture:
    """Five modes in the plane, each a class where the method distils guidance."""
    return five_modes(labelled=registry.get(name).claims.guided)


def one_dimensional() -> GaussianMixture:
    """0.3·N(−1, 0.2²) + 0.7·N(1, 0.3²), whose flow map is exact."""
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.2, 0.3]))


def _save(path: Path, samples: Samples) -> None:
    tensors = {"student": samples.student, "teacher": samples.teacher, "exact": samples.exact}
    if samples.labels is not None:
        tensors["labels"] = samples.labels
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    os.replace(partial, path)
