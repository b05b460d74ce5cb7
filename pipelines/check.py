"""Does an export make the student's samples in another process, without fewstep where it needs none?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.solvers import Sampler
from fewstep.models.denoiser import NetworkDenoiser

from .manifest import read_manifest
from .probe import Answer, probe_of

TOLERANCE = 1e-5  # of a network that predicts v, x_0 or a velocity, in float32


class ReloadFailure(RuntimeError):
    """An export that does not load, or makes other samples than its student."""


@dataclass(frozen=True)
class Exported:
    """An export, and what it was made of.

    Attributes:
        out: its folder.
        student: what was exported, on the CPU in float32.
        sampler: how it makes samples.
    """

    out: Path
    student: NetworkDenoiser
    sampler: Sampler


def difference(out: Path, student: NetworkDenoiser, sampler: Sampler) -> float:
    """`differences` of one export."""
    return differences([Exported(out, student, sampler)])[0]


def differences(exports: Sequence[Exported], batch: int = 2, seed: int = 0) -> list[float]:
    """Largest difference of a sample's entries between fewstep's sampler and each reloaded export, from the same noise.

    The exports run in one fresh process, which cannot import fewstep unless an export says that it needs it. Samples
    are compared as the network makes them, before they are clamped or decoded: in [-1, 1] for pixels.

    Args:
        exports: any number.
        batch: samples of each.
        seed: of the noise.

    Raises:
        ReloadFailure: the fresh process fails.
    """
    manifests = [read_manifest(one.out) for one in exports]
    with tempfile.TemporaryDirectory() as name:
        rooms = [Path(name) / str(i) for i in range(len(exports))]
        for room, one, manifest in zip(rooms, exports, manifests, strict=True):
            room.mkdir()
            probe_of(one.student, manifest, batch, seed).write(room)
        _run([one.out.resolve() for one in exports], rooms)
        theirs = [Answer.read(room) for room in rooms]
    ours = [its.repeated(one.student, one.sampler, manifest)
            for its, one, manifest in zip(theirs, exports, manifests, strict=True)]  # fmt: skip
    return [float((mine - its.samples).abs().max()) for mine, its in zip(ours, theirs, strict=True)]


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


def _run(exports: Sequence[Path], rooms: Sequence[Path]) -> None:
    script = Path(__file__).with_name("reload.py")
    folders = [str(folder) for pair in zip(exports, rooms, strict=True) for folder in pair]
    command = [sys.executable, "-P", str(script), *folders]
    done = subprocess.run(command, cwd=rooms[0], capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ReloadFailure(f"{', '.join(map(str, exports))}: a fresh process cannot use it: {told}")
