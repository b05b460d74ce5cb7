"""The benchmark runs, and counts what a step needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.packaging.source import ROOT


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Of a quick run."""
    out = tmp_path_factory.mktemp("figures") / "step.json"
    words = ["--quick", "--methods", "dmd2", "consistency", "--networks", "unet", "--json", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.step", *words], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text())["steps"]


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


def test_only_one_network_s_activations_are_kept(figures):
    assert figures["unet/dmd2/student"]["saved_bytes"] <= 1.05 * figures["unet/consistency/student"]["saved_bytes"]
