"""Checkpoints are whole or not there, and say what is wrong with them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from tests.training.runs import METHODS, assert_same, begin, config, everything, go


def saved(folder, steps: int = 2, **train) -> TrainState:
    state = begin(config(METHODS["dmd2"], folder, train={"steps": 6, **train}))
    go(state, steps)
    checkpoint.save(folder, state)
    return state


def test_a_checkpoint_is_named_tensors_and_json(tmp_path):
    state = saved(tmp_path)
    (folder,) = checkpoint.list_checkpoints(tmp_path)
    assert folder.name == "step-00000002"
    files = {path.name for path in folder.iterdir()}
    players = {f"{kind}-{name}.safetensors" for kind in ("player", "optimizer") for name in ("student", "fake_score")}
    assert files == players | {"average-ema.safetensors", "rng.safetensors", "state.json"}
    facts = json.loads((folder / "state.json").read_text())
    assert (facts["step"], facts["samples"], facts["updates"]) == (2, 16, {"ema": 0})
    assert facts["sha256"] == {name: checkpoint.sha256(folder / name) for name in files - {"state.json"}}
    stored = load_file(folder / "player-fake_score.safetensors")
    for name, parameter in state.method.players["fake_score"].parameters.items():
        assert torch.equal(stored[name], parameter)
    assert load_file(folder / "optimizer-student.safetensors") == {}, "its turn has not come yet"


def test_the_average_alone_can_be_read(tmp_path):
    state = saved(tmp_path, 3)
    fresh = begin(state.config)
    average = fresh.method.averages["ema"]
    checkpoint.load_average(checkpoint.list_checkpoints(tmp_path)[-1], "ema", average)
    for name, value in state.method.averages["ema"].shadow.items():
        assert torch.equal(average.shadow[name], value)


def test_the_oldest_go(tmp_path):
    state = begin(config(METHODS["pretrain"], tmp_path, train={"steps": 5, "keep_last": 2}))
    for _ in go(state):
        pass
    for step in range(1, 6):
        state.step = step
        checkpoint.save(tmp_path, state)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(tmp_path)] == ["4", "5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("at", ["save_file", "_write_json", "_sync", "rename"])
def test_a_kill_while_saving_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    state = saved(tmp_path)
    before = everything(state)
    go(state, 2)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr("pathlib.Path.rename", kill)
        else:
            patch.setattr(checkpoint, at, kill)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state)
    (left,) = checkpoint.list_checkpoints(tmp_path)
    again = begin(state.config)
    checkpoint.restore(left, again)
    assert_same(before, everything(again))
    go(again, 2)
    assert_same(everything(state), everything(again))
    checkpoint.save(tmp_path, again)
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["step-", "step-"], "the torn one is swept away"


def test_a_kill_while_removing_the_oldest_leaves_no_half_one(tmp_path, monkeypatch):
    state = saved(tmp_path, keep_last=1)
    go(state, 1)

    def remove_half(path, **_: object) -> None:
        (path / "rng.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000003"]
    go(state, 1)
    checkpoint.save(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def damage(folder, what: str) -> None:
    weights = folder / "player-student.safetensors"
    match what:
        case "one bit":
            content = bytearray(weights.read_bytes())
            content[-3] ^= 1
            weights.write_bytes(bytes(content))
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "gone":
            weights.unlink()
        case "torn json":
            (folder / "state.json").write_text('{"step": 2, ')


@pytest.mark.parametrize("what", ["one bit", "cut short", "gone", "torn json"])
def test_damage_is_one_line(tmp_path, what):
    state = saved(tmp_path)
    (folder,) = checkpoint.list_checkpoints(tmp_path)
    damage(folder, what)
    with pytest.raises(UserError, match=r"damaged or missing; .*step-00000002 cannot be used") as caught:
        checkpoint.restore(folder, begin(state.config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"optim": {"lr": 0.5}}, "optim.lr was 0.01, is 0.5"),
        ({"run": {"seed": 4}}, "run.seed was 0, is 4"),
        ({"train": {"ema": 0.5}}, "train.ema was 0.9, is 0.5"),
        (
            {"data": {"batch_size": 4}, "student": {"steps": 2}},
            "data.batch_size was 8, is 4; student.steps was 1, is 2",
        ),
    ],
)
def test_another_config_is_refused_by_name(tmp_path, sections, told):
    saved(tmp_path)
    other = config(METHODS["dmd2"], tmp_path, **sections)
    with pytest.raises(UserError, match=f"made by another config \\({told}\\)"):
        checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], begin(other))


def test_other_settings_of_the_method_are_refused(tmp_path):
    saved(tmp_path)
    other = config({**METHODS["dmd2"], "critic_updates": 3}, tmp_path)
    with pytest.raises(UserError, match=r"method.critic_updates was 2, is 3"):
        checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], begin(other))


def test_what_does_not_decide_the_result_may_change(tmp_path):
    state = saved(tmp_path)
    other = config(
        METHODS["dmd2"],
        tmp_path / "moved",
        data={"workers": 1},
        train={"steps": 4, "log_every": 1, "checkpoint_every": 1, "keep_last": 1, "threads": 1},
    )
    again = begin(other)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], again)
    assert_same(everything(state), everything(again))
