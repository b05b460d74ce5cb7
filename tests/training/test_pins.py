"""Runs that name repositories on the hub go on with the commits that they began with. The hub is a folder here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fewstep.commands.train import logged
from fewstep.config_file import parse
from fewstep.errors import UserError
from fewstep.training.loop import TrainState
from fewstep.training.pins import pinned
from tests.training.digits import digits_run, digits_teacher
from tests.training.runs import weights

NAME = "someone/teacher"


class Hub:
    """One repository, with a commit more whenever its weights change; and what was asked of it."""

    def __init__(self, room: Path) -> None:
        self.room, self.commits, self.asked = room / "snapshots", [], []

    def publish(self, scale: float) -> str:
        commit = f"{len(self.commits):040x}"
        folder = shutil.copytree(digits_teacher(self.room.parent / "teacher"), self.room / commit)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({key: scale * value for key, value in load_file(weights).items()}, weights)
        self.commits.append(commit)
        return commit

    def snapshot(self, name: str, revision: str | None = None, **_: Any) -> str:
        assert name == NAME
        self.asked.append(revision)
        return str(self.room / (revision or self.commits[-1]))


def finish(state: TrainState, step: int = 4) -> None:
    """Train on to that step."""
    for report in logged(state):
        if report.step == step:
            break


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot)
    made.publish(1.0)
    return made


def test_a_run_goes_on_with_the_commit_it_began_with(tmp_path, hub):
    straight = digits_run(tmp_path / "one" / "straight", teacher={"path": NAME})
    finish(straight)
    words: dict[str, Any] = {"teacher": {"path": NAME}, "train": {"checkpoint_every": 2}}
    state = digits_run(tmp_path / "one" / "broken", **words)

    finish(state, 2)
    first, second = hub.commits[0], hub.publish(3.0)
    hub.asked.clear()
    resumed = digits_run(tmp_path / "one" / "broken", **words)
    assert resumed.step == 2
    assert resumed.config.teacher.path == f"{NAME}@{first}"
    assert set(hub.asked) == {first}
    finish(resumed)
    for key, value in weights(straight).items():
        assert value.equal(weights(resumed)[key]), key
    anew = digits_run(tmp_path / "one" / "anew", teacher={"path": NAME})
    assert anew.config.teacher.path == f"{NAME}@{second}"


def test_another_commit_is_another_run(tmp_path, hub):
    finish(digits_run(tmp_path / "one" / "two", teacher={"path": NAME}))
    second = hub.publish(3.0)
    with pytest.raises(UserError, match=rf"teacher\.path was .*, is '{NAME}@{second}'"):
        digits_run(tmp_path / "one" / "two", teacher={"path": f"{NAME}@{second}"})


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        (None, f"{NAME}@{0:040x}"),
        (f"{NAME}@v1", f"{NAME}@v1"),
        (NAME, NAME),  # begun before names had commits
        ("someone/else@v1", f"{NAME}@{0:040x}"),
    ],
)
def test_what_the_run_wrote_down_decides(tmp_path, hub, recorded, path):
    config = parse({"run": {"dir": "run"}, "method": {"name": "dmd2"}, "teacher": {"path": NAME}})
    record = tmp_path / "config.json"
    if recorded is not None:
        record.write_text(json.dumps({"teacher": {"path": recorded}}))
    assert pinned(config, record).teacher.path == path


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_record_is_none(tmp_path, hub, text):
    config = parse({"run": {"dir": "run"}, "method": {"name": "dmd2"}, "teacher": {"path": NAME}})
    (tmp_path / "config.json").write_text(text)
    assert pinned(config, tmp_path / "config.json").teacher.path == f"{NAME}@{0:040x}"


def test_commits_that_are_told_and_folders_stay(tmp_path, hub):
    teacher = str(digits_teacher(tmp_path / "teacher"))
    config = parse({"run": {"dir": "run"}, "method": {"name": "dmd2"},
                    "teacher": {"path": teacher, "weak": f"{NAME}@v2"}})  # fmt: skip
    assert pinned(config, tmp_path / "config.json") == config
    assert hub.asked == []
