"""Checkpoints are whole or not there, and say what is wrong with them."""

from __future__ import annotations

import errno
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep import registry
from fewstep.errors import UserError
from fewstep.training import checkpoint, integrity, tensor_files
from fewstep.training.differences import depends_on_its_length, reads_the_length
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from fewstep.training.retention import list_checkpoints, step_of, superfluous
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, sources, vector_denoiser


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004", "step-00000005"]


def test_some_stay_for_good(tmp_path):
    state = begin(config(METHODS["pretrain"], tmp_path, train={"steps": 12, "keep_last": 2, "keep_every": 4}))
    for step in range(1, 12):
        state.step = step
        checkpoint.save(tmp_path, state)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [4, 8, 10, 11]


def test_an_old_one_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """On a shared disk while somebody reads it; the next save removes it."""
    state = begin(config(METHODS["pretrain"], tmp_path, train={"steps": 9, "keep_last": 1}))
    checkpoint.save(tmp_path, state)

    def busy(old: Path) -> None:
        if old.is_dir():  # not the place of the one that is being saved
            raise OSError(errno.EBUSY, "Device or resource busy", str(old))

    state.step = 2
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "drop", busy)
        checkpoint.save(tmp_path, state)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [0, 2]
    state.step = 4
    checkpoint.save(tmp_path, state)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [4]


def test_a_copy_beside_them_is_no_checkpoint_of_the_run(tmp_path):
    """It is neither gone on from nor dropped, and no step is read from its name."""
    for name in ("step-00000002", "step-00000002-mine", "step-00000009 (copy)", "step-00000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_a_later_one_does_not_push_out_what_is_saved(tmp_path):
    """A run that went back from a damaged checkpoint, and is stopped before it comes to that step again."""
    state = begin(config(METHODS["pretrain"], tmp_path, train={"steps": 9, "keep_last": 1}))
    for step in (8, 2, 4):
        state.step = step
        checkpoint.save(tmp_path, state)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [4, 8]


@pytest.mark.parametrize(
    ("last", "every", "stay"),
    [(1, None, [9]), (3, None, [7, 8, 9]), (1, 3, [3, 6, 9]), (2, 4, [4, 8, 9]), (20, 5, list(range(1, 10)))],
)
def test_what_is_superfluous(tmp_path, last, every, stay):
    found = [tmp_path / f"step-{step:08d}" for step in range(1, 10)]
    gone = superfluous(found, last, every)
    assert [step_of(one) for one in found if one not in gone] == stay


def test_latest_leads_to_a_whole_one(tmp_path, monkeypatch):
    state = saved(tmp_path)
    assert (tmp_path / "latest").readlink() == Path("step-00000002")
    go(state, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", killed)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state)
    assert (tmp_path / "latest" / "state.json").is_file()
    assert (tmp_path / "latest").readlink() == Path("step-00000002")
    checkpoint.save(tmp_path, state)
    assert (tmp_path / "latest").readlink() == Path("step-00000003")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("at", ["save_file", "_write_json", "_sync", "rename"])
def test_a_kill_while_saving_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    state = saved(tmp_path)
    before = everything(state)
    go(state, 2)

    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr("pathlib.Path.rename", killed)
        else:
            patch.setattr(tensor_files if at == "save_file" else checkpoint, at, killed)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state)
    (left,) = checkpoint.list_checkpoints(tmp_path)
    again = begin(state.config)
    checkpoint.restore(left, again)
    assert_same(before, everything(again))
    go(again, 2)
    assert_same(everything(state), everything(again))
    checkpoint.save(tmp_path, again)
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["lates", "step-", "step-"], (
        "the torn one is swept away"
    )


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004"]


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
        case "another digit":
            text = (folder / "state.json").read_text()
            assert '"step": 2,' in text
            (folder / "state.json").write_text(text.replace('"step": 2,', '"step": 3,'))
        case "no facts":
            (folder / "state.json").write_text("[1]")


@pytest.mark.parametrize("what", ["one bit", "cut short", "gone", "torn json", "another digit", "no facts"])
def test_damage_is_one_line(tmp_path, what):
    state = saved(tmp_path)
    (folder,) = checkpoint.list_checkpoints(tmp_path)
    damage(folder, what)
    with pytest.raises(UserError, match=r"damaged or missing; .*step-00000002 cannot be used") as caught:
        checkpoint.restore(folder, begin(state.config))
    assert "\n" not in str(caught.value)


def test_a_file_that_the_disk_does_not_give_back_is_damaged(tmp_path, monkeypatch):
    """As its processes must hear: one that ended at it would leave the others waiting."""
    state = saved(tmp_path)

    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(integrity, "sha256", unreadable)
    with pytest.raises(checkpoint.Damaged, match=r"average-ema.safetensors: damaged or missing; .*00000002 cannot"):
        checkpoint.restore(list_checkpoints(tmp_path)[-1], begin(state.config))


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
    other = config(METHODS["dmd2"], tmp_path, **{**sections, "train": {"steps": 6, **sections.get("train", {})}})
    with pytest.raises(UserError, match=f"made by another config \\({told}\\)"):
        checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], begin(other))


def test_other_settings_of_the_method_are_refused(tmp_path):
    saved(tmp_path)
    other = config({**METHODS["dmd2"], "critic_updates": 3}, tmp_path)
    with pytest.raises(UserError, match=r"method.critic_updates was 2, is 3"):
        checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], begin(other))


def test_what_does_not_decide_the_result_may_change(tmp_path):
    state = begin(config(METHODS["consistency"], tmp_path, train={"steps": 6}))
    go(state, 2)
    checkpoint.save(tmp_path, state)
    other = config(
        METHODS["consistency"],
        tmp_path / "moved",
        data={"workers": 1},
        train={"steps": 4, "log_every": 1, "checkpoint_every": 1, "keep_last": 1, "keep_every": 2, "threads": 1},
        health={"every": 3},
    )
    again = begin(other)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], again)
    assert_same(everything(state), everything(again))


@pytest.mark.parametrize(
    ("method", "optim", "depends"),
    [
        ("consistency", {}, False),
        ("consistency", {"decay": "linear"}, True),
        ("pretrain", {"warmup": 3}, False),
        ("progressive", {}, True),
        ("dmd2", {}, True),
    ],
)
def test_another_length_is_refused_where_it_makes_another_run(tmp_path, method, optim, depends):
    state = begin(config(METHODS[method], tmp_path, optim=optim, train={"steps": 7}))
    assert depends_on_its_length(state) == depends
    go(state, 1)
    checkpoint.save(tmp_path, state)
    longer = begin(config(METHODS[method], tmp_path, optim=optim, train={"steps": 9}))
    if depends:
        with pytest.raises(
            UserError, match=r"made by another config \(train.steps was 7, is 9\); .* go on with --force"
        ):
            checkpoint.restore(list_checkpoints(tmp_path)[-1], longer)
    told: list[str] = []
    checkpoint.restore(list_checkpoints(tmp_path)[-1], longer, told.append)
    assert told == (["train.steps was 7, is 9"] if depends else [])
    assert longer.step == 1


@pytest.mark.parametrize("name", registry.names())
def test_methods_that_read_the_length_are_found(name):
    method = registry.get(name)
    assert reads_the_length(method) == ("run_steps" in inspect.getsource(method))


def test_another_config_can_be_forced(tmp_path):
    state = saved(tmp_path)
    told: list[str] = []
    other = begin(config(METHODS["dmd2"], tmp_path, optim={"lr": 0.5}, train={"steps": 6, "ema": 0.5}))
    checkpoint.restore(list_checkpoints(tmp_path)[-1], other, told.append)
    assert told == ["optim.lr was 0.01, is 0.5; train.ema was 0.9, is 0.5"]
    assert_same(everything(state), everything(other))
    go(other, 1)
    assert other.optimizers["student"].adamw.param_groups[0]["lr"] == 0.5


def in_bitsandbytes_place(parameters, config, lr, weight_decay):
    return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay)


def test_steps_counted_in_plain_numbers_come_back_as_such(tmp_path, monkeypatch):
    """bitsandbytes counts so; torch's unfused AdamW stands in its place."""
    monkeypatch.setattr("fewstep.training.optim.make_8bit", in_bitsandbytes_place)
    state = begin(config(METHODS["pretrain"], tmp_path, optim={"kind": "adamw_8bit"}))
    go(state, 3)
    for one in state.optimizers["student"].adamw.state.values():
        one["step"] = int(one["step"])
    checkpoint.save(tmp_path, state)
    again = begin(state.config)
    checkpoint.restore(list_checkpoints(tmp_path)[-1], again)
    ours, theirs = (one.optimizers["student"] for one in (state, again))
    for name, leaf in theirs.leaves.items():
        found, wanted = theirs.adamw.state[leaf], ours.adamw.state[ours.leaves[name]]
        assert isinstance(found["step"], int)
        assert found["step"] == 3
        assert torch.equal(found["exp_avg_sq"], wanted["exp_avg_sq"])


def test_moments_of_another_form_cannot_be_forced(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr("fewstep.training.optim.make_8bit", in_bitsandbytes_place)
    other = begin(config(METHODS["dmd2"], tmp_path, optim={"kind": "adamw_8bit"}, train={"steps": 6}))
    before = everything(other)
    line = r"step-00000002: optim.kind was adamw, is adamw_8bit, which keeps its moments in another form; such a change"
    with pytest.raises(UserError, match=line):
        checkpoint.restore(list_checkpoints(tmp_path)[-1], other, lambda text: None)
    assert_same(before, everything(other))


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("dmd2_gan", r"step-00000002: made by a run without player discriminator; change run.dir"),
        ("wider", r"player-student.safetensors: first.bias is \(16,\), in this run \(24,\); such a change needs"),
    ],
)
def test_other_networks_cannot_be_forced(tmp_path, method, told):
    saved(tmp_path)
    run = config(METHODS["dmd2" if method == "wider" else method], tmp_path, train={"steps": 6})
    other = begin(
        run, Sources(sources().dataset, sources().teacher, vector_denoiser(width=24)) if method == "wider" else None
    )
    before = everything(other)
    with pytest.raises(UserError, match=told):
        checkpoint.restore(list_checkpoints(tmp_path)[-1], other, lambda text: None)
    assert_same(before, everything(other))


def test_another_kind_of_device_is_refused(tmp_path):
    state = saved(tmp_path)
    path = list_checkpoints(tmp_path)[-1] / "state.json"
    path.write_text(json.dumps(integrity.sealed(integrity.read_facts(path.parent) | {"device": "cuda"})))
    with pytest.raises(UserError, match=r"was made on cuda, this run is on cpu, .*; go on on cuda, or change run.dir"):
        checkpoint.restore(path.parent, begin(state.config), lambda text: None)


def test_bad_steps_are_counted_over_the_whole_run(tmp_path):
    state = begin(config(METHODS["dmd2"], tmp_path, train={"steps": 6}))
    state.optimizers["student"].skips.note(torch.tensor(float("nan")))
    checkpoint.save(tmp_path, state)
    again = begin(state.config)
    checkpoint.restore(list_checkpoints(tmp_path)[-1], again)
    assert {name: one.skips.read() for name, one in again.optimizers.items()} == {
        "student": [1, 1],
        "fake_score": [0, 0],
    }
