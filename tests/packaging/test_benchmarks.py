"""The benchmark runs, and counts what a step needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.shapes import SHAPES
from tests.packaging.source import ROOT

PARAMETERS = {"sd15": 859.5, "sdxl": 2567.5, "dit_xl_2": 749.8}
"""Millions, of the models that the shapes are those of; each block of DiT in diffusers embeds the classes anew."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Of a quick run."""
    out = tmp_path_factory.mktemp("figures") / "step.json"
    words = ["--quick", "--methods", "dmd2", "consistency", "--networks", "unet", "--json", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.step", *words], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text())["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "needs"),
    [
        ("unet/dmd2/critic", {"forward": 2, "forward + backward to weights": 2}),
        ("unet/dmd2/student", {"forward": 4, "forward + backward to weights": 2}),
        ("unet/consistency/student", {"forward": 4, "forward + backward to weights": 2}),
    ],
)
def test_a_step_needs_these_evaluations_and_no_other(figures, step, needs):
    """Of a batch of two: the student, then teacher and fake score without gradient; the student and its target."""
    assert figures[step]["needs"] == needs
    assert figures[step]["overhead"] > 0
    assert figures[step]["saved_bytes"] > 0


@pytest.mark.slow
def test_only_one_network_s_activations_are_kept(figures):
    """The student step of DMD2 keeps what one forward pass of the student keeps, and next to nothing besides."""
    student = figures["unet/dmd2/student"]
    assert student["saved_bytes"] <= 1.05 * student["needed_bytes"]
    assert student["needed_bytes"] <= 1.05 * figures["unet/consistency/student"]["saved_bytes"]


@pytest.mark.slow
def test_the_benchmark_of_a_device_runs_on_small_networks(tmp_path, monkeypatch, capsys):
    """Every section, on a CPU; kernels that are not there are said to be missing."""
    from benchmarks import gpu

    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(tmp_path)])
    gpu.main()
    capsys.readouterr()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["sections"]) == ["steps", "lora", "attention", "jvp"]
    assert all(not section["not_reached"] for section in report["sections"].values())
    found = report["sections"]["steps"]["figures"]
    assert list(found) == [f"{shape}/{method}/eager" for shape in SHAPES for method in ("dmd2", "consistency")]
    assert all(turn["images_per_second"] > 0 for turns in found.values() for turn in turns.values())
    lora = report["sections"]["lora"]["figures"]
    assert set(lora["adapters"]) == set(lora["three copies"]) == {"student", "critic"}
    kernels = report["sections"]["attention"]["figures"]
    assert kernels["flux_blocks/sdpa"]["seconds"] > 0
    assert "memory.attention: flash given" in kernels["flux_blocks/flash"]["error"]
    derivatives = report["sections"]["jvp"]["figures"]
    assert all(one["relative_difference"] < 0.05 for one in derivatives.values())


def test_time_that_is_over_is_said(tmp_path, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--minutes", "0", "--sections", "jvp", "--out", str(tmp_path)])
    gpu.main()
    section = json.loads((tmp_path / "gpu.json").read_text())["sections"]["jvp"]
    assert section == {"figures": {}, "not_reached": ["sd15", "dit_xl_2", "flux_blocks"]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name):
    with torch.device("meta"):
        network = SHAPES[name].build(False)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.01)
