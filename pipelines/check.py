"""Does an export make the student's samples where fewstep is not there?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.models.denoiser import NetworkDenoiser

from .manifest import read_manifest
from .probe import Probe, probe_of
from .recipes import RECIPES

TOLERANCE = 1e-5  # of a network that predicts v, x_0 or a velocity, in float32


class ReloadFailure(RuntimeError):
    """An export that does not load, or makes other samples than its student."""


def difference(out: Path, student: NetworkDenoiser, sampler: Sampler, batch: int = 2, seed: int = 0) -> float:
    """Largest difference of a sample's entries between fewstep's sampler and the reloaded export, from the same noise.

    The export runs in a fresh process that cannot import fewstep. Samples are compared as the network makes them,
    before they are clamped or decoded: in [-1, 1] for pixels.

    Args:
        out: an export.
        student: what was exported, on the CPU in float32.
        sampler: how it makes samples.
        batch: how many.
        seed: of the noise.

    Raises:
        ReloadFailure: the fresh process fails.
    """
    manifest = read_manifest(out)
    probe = probe_of(student, RECIPES[manifest.pipeline], manifest.call, batch, seed)
    theirs = _reloaded(out, probe, manifest.missing)
    with torch.no_grad():
        ours = sample(student, sampler, probe.noise, probe.condition, probe.renoising())
    return float((ours - theirs).abs().max())


def allowed(student: NetworkDenoiser, sampler: Sampler) -> float:
    """1e-5; times 1/α at the first step for an ε-network, whose x̂_0 = (x − σ·ε̂)/α is rounded that much coarser."""
    if student.kind is not Kind.EPS:
        return TOLERANCE
    first = torch.tensor(sampler.times[0], dtype=torch.float64)
    return TOLERANCE / float(student.process.alpha(first))


def check(out: Path, student: NetworkDenoiser, sampler: Sampler) -> float:
    """`difference`, refused where it is larger than `allowed`.

    Raises:
        ReloadFailure: the samples differ by more, with the figure, or the fresh process fails.
    """
    figure, limit = difference(out, student, sampler), allowed(student, sampler)
    if not figure <= limit:  # also when it is not a number
        raise ReloadFailure(f"{out}: reloaded samples differ by up to {figure:.3g}, allowed is {limit:.3g}")
    return figure


def _reloaded(out: Path, probe: Probe, missing: tuple[str, ...]) -> Tensor:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "call.json").write_text(json.dumps({"call": dict(probe.call), "missing": missing}))
        states = {"generator": probe.generator, "global": probe.after.clone()}
        save_file({**{k: v.contiguous() for k, v in probe.tensors.items()}, **states}, work / "in.safetensors")
        _run(out.resolve(), work)
        return load_file(work / "out.safetensors")["samples"]


def _run(out: Path, work: Path) -> None:
    script = Path(__file__).with_name("reload.py")
    command = [sys.executable, "-P", str(script), str(out), str(work)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ReloadFailure(f"{out}: a fresh process without fewstep cannot use it: {told}")
