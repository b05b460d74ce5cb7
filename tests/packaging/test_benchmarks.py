"""The benchmark runs, and counts what a step needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

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
def test_the_benchmark_of_a_device_runs_on_small_networks(tmp_path):
    """Every section, on a CPU; kernels and graphs that are not there are said to be missing."""
    words = ["--tiny", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    sections = {name: section["figures"] for name, section in report["sections"].items()}
    assert list(sections) == ["eager", "lora", "precision", "graphs", "attention", "jvp", "compiled"]
    assert all(not section["not_reached"] and "error" not in section for section in report["sections"].values())
    both = {f"{shape}/{method}" for shape in SHAPES for method in ("dmd2", "consistency")}
    assert set(sections["eager"]) == set(sections["compiled"]) == both
    for title in ("eager", "compiled", "lora", "precision"):
        for name, turns in sections[title].items():
            assert all(turn["images_per_second"] > 0 for turn in turns.values()), (title, name, turns)
    assert set(sections["lora"]["adapters"]) == set(sections["lora"]["three copies"]) == {"student", "critic"}
    assert set(sections["precision"]) == {"bf16", "bf16_weights"}
    assert sections["graphs"]["none"]["student"]["seconds"] > 0
    assert "graphs given, which CUDA alone records" in sections["graphs"]["graphs"]["error"]
    kernels = sections["attention"]
    assert kernels["flux_blocks/sdpa"]["forward and backward"]["seconds"] > 0
    assert "memory.attention: flash given" in kernels["flux_blocks/flash"]["error"]
    assert all(max(one["relative_differences"].values()) < 0.05 for one in sections["jvp"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
def test_every_kind_of_compilation_is_timed(tmp_path, monkeypatch):
    """With a compiler that leaves the code as it is, which takes seconds."""
    from benchmarks import compiled

    plain, threads = torch.compile, torch.get_num_threads()
    monkeypatch.setattr(torch, "compile", lambda call, **words: plain(call, backend="eager", **words))
    words = ["--quick", "--methods", "flow_map", "--json", str(tmp_path / "compiled.json")]
    monkeypatch.setattr(sys, "argv", ["compiled", *words])
    try:
        compiled.main()
    finally:
        torch.set_num_threads(threads)
    (kinds,) = json.loads((tmp_path / "compiled.json").read_text())["steps"].values()
    assert kinds["none"]["step"] == kinds["none"]["derivative"] == 1
    for mode in ("none", "blocks", "whole"):
        assert 0.1 < kinds[mode]["step"] < 10
        assert 0.1 < kinds[mode]["derivative"] < 10
        assert kinds[mode]["first"] > 0


def test_what_fails_or_hangs_costs_no_other_figure(tmp_path, monkeypatch, capsys):
    """An error in a measurement, one between two, and a measurement that would not end."""
    from benchmarks import gpu, gpu_clock

    def broken(bench: object, section: gpu_clock.Section) -> None:
        section.measure("one", lambda: {}["missing"])
        section.measure("two", lambda: 2)
        section.final = time.monotonic() + 0.05
        section.measure("three", lambda: time.sleep(60))
        raise AssertionError("between two")

    monkeypatch.setattr(gpu, "SECTIONS", {"first": (broken, 0.5), "second": (lambda _, s: s.measure("x", int), 0.5)})
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(tmp_path)])
    gpu.main()
    capsys.readouterr()
    first, second = json.loads((tmp_path / "gpu.json").read_text())["sections"].values()
    late = {"error": "cut short: its time was over"}
    assert first["figures"] == {"one": {"error": "KeyError: 'missing'"}, "two": 2, "three": late}
    assert first["error"] == "AssertionError: between two"
    assert second == {"figures": {"x": 0}, "not_reached": []}


def test_a_run_is_told_to_end_before_it_is_cut_short(tmp_path, monkeypatch):
    """The last one too, whose share ends with the section: it has time to save."""
    from benchmarks import gpu_clock, gpu_train

    limits: list[float] = []
    monkeypatch.setattr(gpu_train, "_command", lambda words, seconds: limits.append(seconds))
    ends = time.monotonic() + 100
    gpu_train.trained(tmp_path, gpu_clock.Section(ends, ends), tiny=True)
    assert limits == [pytest.approx(100 - gpu_train.SAVE, abs=1)]


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
