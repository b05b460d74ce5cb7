"""A leaderboard: the same noise and real images for students and teacher, and what training cost beside the figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fewstep.commands import report
from fewstep.errors import RunError
from tests.cli.lab import Outcome, call, write_teacher


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_teacher(folder / "teacher", 32, 24)
    return folder


def train(root: Path, name: str, seed: int, **student: object) -> Path:
    """A consistency student that hardly moved from a random teacher which the shipped classifier can judge."""
    values = {
        "run": {"dir": str(root / name), "seed": seed},
        "teacher": {"path": str(root / "teacher")},
        "student": {"steps": 2, **student},
        "method": {"name": "consistency", "solver": "ddim", "target": "self"},
        "data": {"name": "emoji32", "batch_size": 2},
        "optim": {"lr": 1e-9},
        "train": {"steps": 2, "ema": 0, "log_every": 1, "sample_every": 0},
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    outcome = call("train", str(root / f"{name}.yaml"))
    assert outcome.code == 0, outcome.err
    return root / name


@pytest.fixture(scope="module")
def run(root):
    return train(root, "student", 3)


@pytest.fixture(scope="module")
def second(root):
    return train(root, "other", 4)


@pytest.fixture(autouse=True)
def a_short_solver(monkeypatch):
    """A teacher's own sampler takes four steps here instead of 32."""
    monkeypatch.setattr(report, "SOLVER_STEPS", 4)


def compare(*arguments: object, out: Path, samples: int = 16, steps: tuple[int, ...] = (1,)) -> Outcome:
    counts = [word for count in steps for word in ("--steps", str(count))]
    return call("report", *map(str, arguments), "--out", str(out), "--samples", str(samples), *counts)


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())["rows"]


@pytest.fixture
def measured(monkeypatch):
    """What is measured, in order, as (few steps or not, steps)."""
    seen = []

    def counting(source, sampler, *arguments):
        seen.append(("student" if source.few_step else "teacher", len(sampler.times)))
        return make(source, sampler, *arguments)

    make = report.make_images
    monkeypatch.setattr(report, "make_images", counting)
    return seen


def test_a_student_that_learnt_nothing_is_its_teacher_at_one_step(run, tmp_path):
    outcome = compare(run, out=tmp_path, steps=(1, 2))
    assert outcome.code == 0, outcome.err
    found = {(row["method"], row["steps"]): row for row in rows_of(tmp_path)}
    assert sorted(found) == [("consistency", 1), ("consistency", 2), *(("teacher teacher", n) for n in (1, 2, 4))]
    student, taught = found["consistency", 1], found["teacher teacher", 1]
    assert student["fd"] == pytest.approx(taught["fd"], rel=1e-3)
    assert student["of_teacher"] == pytest.approx(1, rel=1e-3)
    assert found["consistency", 2]["fd"] != pytest.approx(found["teacher teacher", 2]["fd"], rel=1e-3), "fresh noise"
    assert (student["seed"], student["training_images"], taught["seed"], taught["of_teacher"]) == (3, 4, None, None)
    assert f"| consistency | student | 1 | {student['fd']:.2f} | 1.00 |" in (tmp_path / "leaderboard.md").read_text()
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert len(re.findall("<img ", (tmp_path / "index.html").read_text())) == 5


def test_a_run_more_measures_that_run_alone(run, second, tmp_path, measured):
    assert compare(run, out=tmp_path / "first").code == 0
    assert measured == [("teacher", 1), ("teacher", 4), ("student", 1)]
    before = rows_of(tmp_path / "first")
    measured.clear()
    assert compare(second, "--json", tmp_path / "first" / "report.json", out=tmp_path / "both").code == 0
    assert measured == [("student", 1)]
    after = rows_of(tmp_path / "both")
    assert all(row in after for row in before)
    assert [row["run"] for row in after if row["run"]] == ["student", "other"]
    assert "| consistency | mean of 2 | 1 |" in (tmp_path / "both" / "leaderboard.md").read_text()
    assert len(re.findall("<img ", (tmp_path / "both" / "index.html").read_text())) == 4
    measured.clear()
    assert compare(run, out=tmp_path / "both").code == 0, "the same folder again, with fewer runs"
    assert measured == []
    assert rows_of(tmp_path / "both") == before


def test_an_interrupted_report_goes_on_where_it_was(run, tmp_path, measured, monkeypatch):
    def full(path, images):
        if "teacher-4-" in path.name:
            raise RunError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(report, "save_strip", full)
        assert compare(run, out=tmp_path).code == 1
    measured.clear()
    assert compare(run, out=tmp_path).code == 0
    assert measured == [("teacher", 4), ("student", 1)]


def test_a_run_that_was_trained_anew_is_measured_anew(run, root, tmp_path, measured):
    copy = Path(shutil.copytree(run, tmp_path / "student"))
    assert compare(copy, out=tmp_path / "out").code == 0
    measured.clear()
    config = json.loads((copy / "config.json").read_text())
    config["method"]["skip"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    outcome = compare(copy, "--json", tmp_path / "out" / "report.json", out=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "student, 1 step: trained since it was measured, its earlier row goes" in outcome.err
    assert measured == [("student", 1)]
    assert len([row for row in rows_of(tmp_path / "out") if row["run"]]) == 1


def test_an_earlier_report_of_other_counts_is_refused_before_anything_is_measured(run, tmp_path, measured):
    assert compare(run, out=tmp_path / "a").code == 0
    measured.clear()
    outcome = compare(run, "--json", tmp_path / "a" / "report.json", out=tmp_path / "b", samples=20)
    assert (outcome.code, measured) == (2, [])
    assert "error: report: samples is 20 here and 16 in the earlier one; measure all rows alike" in outcome.err
    assert compare(run, out=tmp_path / "a", samples=20).code == 0, "in its own folder a new report replaces it"
    assert len(measured) == 3


def test_an_export_takes_part_as_its_run_does(run, tmp_path):
    outcome = call("export", str(run), str(tmp_path / "export"), "--no-verify")
    assert outcome.code == 0, outcome.err
    outcome = compare(run, tmp_path / "export", out=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    trained, exported = (row for row in rows_of(tmp_path / "out") if row["run"])
    assert (trained["run"], exported["run"]) == ("student", "export")
    assert exported["fd"] == pytest.approx(trained["fd"], rel=1e-6)
    assert exported["of_teacher"] == pytest.approx(trained["of_teacher"], rel=1e-6)
    assert (exported["training_seconds"], exported["training_images"], exported["seed"]) == (None, None, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "report: name at least one run or export, or an earlier report with --json"),
        (["{teacher}"], "no config.json; the folder of a run is needed"),
        (["--json", "{out}/missing.json"], "missing.json cannot be read (No such file or directory)"),
        (["--json", "{trained}/config.json"], "config.json is no report.json that this version"),
        (["{trained}", "--samples", "2"], "'--samples': Input should be greater than or equal to 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(lab, arguments, said):
    places = {"teacher": lab.teacher, "trained": lab.trained, "out": lab.folder}
    outcome = call("report", *(word.format(**places) for word in arguments), "--out", str(lab.folder / "out"))
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_a_browser(run, tmp_path, scheme):
    """What the page's own script would say, were there one: the test adds it to a copy, and reads the page back."""
    assert compare(run, out=tmp_path, steps=(1, 2)).code == 0
    probe = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(image => [image.naturalWidth, image.naturalHeight]);
  const boxes = [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().height > 100);
  const ink = getComputedStyle(document.body);
  document.body.innerHTML = "";
  document.title = JSON.stringify({images, boxes, colours: [ink.color, ink.backgroundColor], rows: window.rows});
});
window.rows = document.querySelectorAll("tbody tr").length;
</script>"""
    page = (tmp_path / "index.html").read_text()
    (tmp_path / "probe.html").write_text(page.replace("</main>", f"</main>{probe}"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "probe.html")]
    words += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    done = subprocess.run([str(browser()), *words], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(title.group(1))
    assert found["images"] == [[12 * 34 - 2, 32]] * 5
    assert found["boxes"] == [True] * 3
    assert found["rows"] == 5
    paper = {"light": "rgb(253, 253, 252)", "dark": "rgb(22, 24, 27)"}
    assert found["colours"][1] == paper[scheme]
