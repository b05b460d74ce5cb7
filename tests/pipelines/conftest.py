"""Students of every family, and their export in this process: starting another for each would take minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.diffusion.solvers import Sampler
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from fewstep.pipelines import check, reload
from fewstep.pipelines.card import CardFacts
from fewstep.pipelines.export import export_student
from tests import tiny

FACTS = CardFacts("dmd2", "Yin et al. 2024", config={"run": {"seed": 0}})


@dataclass(frozen=True)
class Student:
    """A student, with its teacher's folder where its pipeline needs one."""

    denoiser: NetworkDenoiser
    folder: Path | None = None


@pytest.fixture
def cosine() -> VP:
    return VP(alphas_cumprod({"beta_schedule": "squaredcos_cap_v2"}))


@pytest.fixture
def pixels(cosine: VP) -> Student:
    return Student(make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(cosine, Kind.V)))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Student]:
    """Whole pipelines on disk, by name, built once."""
    root = tmp_path_factory.mktemp("teachers")
    build = {"sd15": tiny.sd15_pipeline, "dit": tiny.dit_pipeline, "sd3": tiny.sd3_pipeline}

    def student(name: str) -> Student:
        folder = root / name
        if not folder.exists():
            build[name]().save_pretrained(folder)
        return Student(load_denoiser(str(folder)), folder)

    return student


@pytest.fixture
def made_flow() -> Student:
    return Student(make_denoiser(tiny.alive(tiny.unet2d()), Schedule(Flow(), Kind.VELOCITY)))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's other process is this one, its global generator put back."""

    def run(exports: Sequence[Path], rooms: Sequence[Path]) -> None:
        with torch.random.fork_rng(devices=[]):
            for export, room in zip(exports, rooms, strict=True):
                reload.make_samples(export, room)

    monkeypatch.setattr(check, "_run", run)


def difference(student: Student, sampler: Sampler, out: Path) -> float:
    """Exported and reloaded."""
    export_student(student.denoiser, sampler, student.folder, out, FACTS)
    return check.difference(out, student.denoiser, sampler)
