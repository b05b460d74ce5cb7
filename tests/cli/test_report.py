"""A leaderboard: the same noise and real images for students and teacher, and what training cost beside the figures."""

from __future__ import annotations

import json

import pytest

from tests.cli.lab import call, write_teacher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A consistency student of two steps, of a random teacher that the shipped classifier can judge."""
    root = tmp_path_factory.mktemp("runs")
    teacher = write_teacher(root / "teacher", 32, 24)
    config = root / "student.yaml"
    config.write_text(f"""
run: {{dir: {root / "student"}, seed: 3}}
teacher: {{path: {teacher}}}
student: {{steps: 2}}
method: {{name: consistency, solver: ddim, target: self}}
data: {{name: emoji32, batch_size: 2}}
optim: {{lr: 1.0e-9}}
train: {{steps: 2, ema: 0, log_every: 1, sample_every: 0}}
""")
    outcome = call("train", str(config))
    assert outcome.code == 0, outcome.err
    return root / "student"


def test_a_student_that_learnt_nothing_is_its_teacher_at_one_step(run, tmp_path):
    outcome = call("report", str(run), "--out", str(tmp_path), "--samples", "30", "--steps", "1", "--steps", "2")
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    found = {(row["method"], row["steps"]): row for row in rows}
    assert sorted(found) == [("consistency", 1), ("consistency", 2), *(("teacher teacher", n) for n in (1, 2, 32))]
    student, taught = found["consistency", 1], found["teacher teacher", 1]
    assert student["fd"] == pytest.approx(taught["fd"], rel=1e-3)
    assert student["of_teacher"] == pytest.approx(1, rel=1e-3)
    assert found["consistency", 2]["fd"] != pytest.approx(found["teacher teacher", 2]["fd"], rel=1e-3), "fresh noise"
    assert (student["seed"], student["training_images"], taught["seed"], taught["of_teacher"]) == (3, 4, None, None)
    lines = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert f"| consistency | 1 | {student['fd']:.2f} | 1.00 |" in "\n".join(lines)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_a_run_without_a_teacher_is_refused(lab):
    outcome = call("report", str(lab.teacher), "--out", str(lab.folder / "out"))
    assert (outcome.code, "no config.json" in outcome.err) == (2, True)
