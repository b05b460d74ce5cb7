"""Scores of a run on latents while it trains: the command's own, and a run that does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.commands import report
from fewstep.commands.evaluate import Request, evaluate
from fewstep.commands.train import logged
from fewstep.config_file import parse
from fewstep.errors import UserError
from fewstep.training.opening import open_sources
from fewstep.training.tracking import read_lines
from tests.cli.lab import call
from tests.data.cache_lab import pictures
from tests.tiny_features import MEANS
from tests.tiny_pipelines import saved
from tests.training.runs import assert_same, begin, everything, with_sections

SIDE = 16
EVALUATE = {"every": 2, "samples": 5, "features": MEANS, "batch_size": 3, "metrics": ["fd", "kid"]}
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD1.5, seven captioned pictures and a list of prompts."""
    root = tmp_path_factory.mktemp("scored")
    saved("sd15", root)
    pictures(root / "set", side=SIDE)
    (root / "list.txt").write_text("a red fish\nan owl\n")
    return root


def values(place: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of two steps; each section takes what is told over these settings."""
    out: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(place / "sd15")},
        "student": {"lora": 2},
        "method": {"name": "dmd2", "critic_updates": 1, "fake_score_lora": 2},
        "data": {"name": "captions", "path": str(place / "set"), "size": SIDE, "batch_size": 2},
        "optim": {"lr": 1e-2},
        "train": {"steps": 2, "sample_every": 0, "log_every": 1, "checkpoint_every": 2, "trackers": []},
        "health": {"every": 0},
    }
    return with_sections(out, sections)


def finished(run: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Everything at the end of a run, and where it left torch's own stream."""
    config = parse(run)
    torch.manual_seed(5)
    state = begin(config, open_sources(config))
    for _ in logged(state):
        pass
    return everything(state), torch.get_rng_state()


def figures(folder: Path) -> dict[str, Any]:
    line = read_lines(folder / "run" / "log.jsonl")[-1]
    return {key.removeprefix("evaluate/"): value for key, value in line.items() if key.startswith("evaluate/")}


def asked(place: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """What the command says of the run's checkpoint."""
    reference = f"captions:{place / 'set'}"
    request = Request(str(folder / "run"), reference, MEANS, 5, None, None, 5, 0, ("fd", "kid"), **more)
    return evaluate(request)[1].as_json()


@pytest.mark.slow
def test_a_run_that_encodes_is_scored_as_by_the_command_and_does_not_notice(place, tmp_path):
    plain = finished(values(place, tmp_path / "plain"))
    scored = finished(values(place, tmp_path, evaluate=EVALUATE))
    assert_same(plain[0], scored[0])
    assert torch.equal(plain[1], scored[1])
    seen, told = figures(tmp_path), asked(place, tmp_path)
    for name in ("fd", "kid"):
        assert seen[name] == pytest.approx(told[name], rel=1e-3, abs=1e-4)
    assert seen["reference_sha256"] == told["reference_sha256"]
    assert seen["prompts_sha256"] == told["prompts_sha256"]


@pytest.mark.slow
def test_a_run_on_a_cache_is_scored_on_what_the_cache_was_made_of(place, tmp_path):
    words = ["--data", "captions", "--path", str(place / "set"), "--size", str(SIDE), "--batch", "1", "--flip"]
    outcome = call("cache", str(place / "sd15"), str(tmp_path / "cache"), *words)
    assert outcome.code == 0, outcome.err
    data = {"name": "cache", "path": str(tmp_path / "cache"), "size": None}
    plain = finished(values(place, tmp_path / "plain", data=data))
    listed = {**EVALUATE, "prompts": str(place / "list.txt"), "metrics": ["fd", "kid", "diversity"], "best": "kid"}
    run = values(place, tmp_path, data=data, evaluate=listed, memory={"encoders": "host"})
    scored = finished(run)
    assert_same(plain[0], scored[0])
    assert torch.equal(plain[1], scored[1])
    seen, told = figures(tmp_path), asked(place, tmp_path, prompts=place / "list.txt")
    assert seen["fd"] == pytest.approx(told["fd"], rel=1e-3, abs=1e-4)
    assert (seen["reference_sha256"], seen["prompts_sha256"]) == (told["reference_sha256"], told["prompts_sha256"])
    assert seen["diversity"] > 0
    assert (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_a_report_has_students_and_teachers_drawn_by_the_same_prompts(place, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SOLVER_STEPS", 2)
    finished(values(place, tmp_path, teacher={"path": str(place / "sd15"), "guidance": 2.0}))
    words = ["--reference", f"captions:{place / 'set'}", "--features", MEANS, "--samples", "5", "--batch-size", "3"]
    for prompts in ([], ["--prompts", str(place / "list.txt")]):
        outcome = call("report", str(tmp_path / "run"), *words, "--out", str(tmp_path / "report"), *prompts)
        assert outcome.code == 0, outcome.err
        rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
        found = {(row["method"], row["steps"]): row["fd"] for row in rows}
        assert sorted(found) == [("dmd2", 1), ("teacher sd15", 1), ("teacher sd15", 2)]
        listed = place / "list.txt" if prompts else None
        student, teacher = (
            evaluate(Request(source, words[1], MEANS, 5, 1, scale, 5, 0, ("fd", "kid"), prompts=listed))[1].fd.value
            for source, scale in ((str(tmp_path / "run"), None), (str(place / "sd15"), 2.0))
        )
        assert found["dmd2", 1] == pytest.approx(student, rel=1e-3)
        assert found["teacher sd15", 1] == pytest.approx(teacher, rel=1e-3)
    outcome = call("report", "--json", str(tmp_path / "report" / "report.json"), *words, "--out", str(tmp_path / "two"))
    assert (outcome.code, "report: prompts is not given here and" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"name": "prompts", "path": "{place}/list.txt"}},
         "evaluate.reference: missing; a run on prompts has no pictures to be measured against; name some, as "
         "captions:FOLDER"),
        ({"evaluate": {**EVALUATE, "prompts": "{place}/lost.txt"}},
         "evaluate.prompts: '{place}/lost.txt' cannot be read"),
        ({"evaluate": {**EVALUATE, "metrics": ["accuracy"]}},
         "evaluate.metrics: accuracy needs classes, and the source takes prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_one_line(place, tmp_path, sections, line):
    for section in sections.values():
        section |= {key: value.format(place=place) for key, value in section.items() if isinstance(value, str)}
    with pytest.raises(UserError) as error:
        finished(values(place, tmp_path, **{"evaluate": EVALUATE, **sections}))
    assert str(error.value).startswith(line.format(place=place))
