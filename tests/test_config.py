"""Configs: what is read is what is written, and what a method declares is what is checked."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from fewstep import registry
from fewstep.commands.configs import shipped
from fewstep.config import NewNetwork, PlayerOptim, RunConfig
from fewstep.config_file import flat, load, parse
from fewstep.errors import UserError
from fewstep.section import Needs, Section
from fewstep.training.method import Method
from tests.cli.lab import call

YAML = """
run: {dir: runs/x, seed: 3}
teacher: {path: emoji32}
method: {name: dmd2, critic_updates: 2}
optim: {lr: 1e-3, betas: [0, 0.99], players: {fake_score: {lr: 2.0e-3}}}
"""
SECTIONS = [RunConfig, NewNetwork, PlayerOptim, *(field.annotation for field in RunConfig.model_fields.values())]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


class OddConfig(registry.MethodConfig):
    """Settings of somebody else's method."""

    oddness: int = Field(default=3, ge=1)
    """How odd."""
    spin: Annotated[float, Needs("oddness")] = 0.5
    """How fast."""


class Odd(Method):
    """Does something odd."""

    Config = OddConfig
    family = "odd"
    paper = "Nobody 2020"
    needs_teacher = False


@pytest.fixture
def third_party(monkeypatch):
    """A method `odd` of another package."""
    own = importlib.metadata.entry_points
    entry = importlib.metadata.EntryPoint("odd", f"{__name__}:Odd", registry.GROUP)
    broken = importlib.metadata.EntryPoint("broken", "no_such_package:Method", registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*own(group=group), entry, broken])
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", _load_here(importlib.metadata.EntryPoint.load))
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()


def _load_here(load):
    """Tests are imported under a name that cannot be imported again."""
    return lambda entry: Odd if entry.name == "odd" else load(entry)


def test_a_file_with_overrides_is_read(path):
    config = load(path, ["train.steps=7", "optim.players.student.lr=1e-2", "teacher.guidance=2", "run.dir=runs/a=b"])
    assert (config.train.steps, config.teacher.guidance, config.run.dir) == (7, 2.0, Path("runs/a=b"))
    assert config.optim.lr == 1e-3
    assert config.optim.betas == (0.0, 0.99)
    assert {name: player.lr for name, player in config.optim.players.items()} == {"fake_score": 2e-3, "student": 1e-2}
    assert flat(config)["method.critic_updates"] == 2


def test_a_later_override_wins(path):
    assert load(path, ["train.steps=7", "train.steps=9"]).train.steps == 9


def test_an_override_may_reset_to_null(path):
    assert load(path, ["optim.clip=null"]).optim.clip is None


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_parse_and_survive_json(name):
    config = load(shipped()[name])
    again = parse(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert flat(again) == flat(config)


def test_runs_that_differ_differ_when_flat(path):
    one, other = flat(load(path)), flat(load(path, ["method.renoise=[0.1,0.9]"]))
    assert [key for key in one if one[key] != other[key]] == ["method.renoise"]


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("trian=1", "train"),
        ("method.renoize=[0,1]", "renoise"),
        ("optim.players.student.wait_decay=1", "weight_decay"),
        ("student.new.beta_scedule=linear", "beta_schedule"),
    ],
)
def test_unknown_keys_at_any_depth_have_a_nearest_name(path, word, near):
    with pytest.raises(UserError, match=f"{word.partition('=')[0]}: unknown key; did you mean '{near}'"):
        load(path, [word])


def test_an_unknown_key_without_a_near_name_lists_what_is_allowed(path):
    with pytest.raises(UserError, match=r"teacher\.zzz: unknown key, allowed are path, guidance"):
        load(path, ["teacher.zzz=1"])


def test_the_first_three_of_many_mistakes_are_told():
    with pytest.raises(UserError) as error:
        parse({"run": {"dir": "x", "a": 1, "b": 2, "c": 3}, "method": {"name": "pretrain"}, "trian": {}})
    assert str(error.value).count("unknown key") == 3
    assert str(error.value).endswith("; and 1 more")


@pytest.mark.parametrize("section", [s for s in SECTIONS if isinstance(s, type) and issubclass(s, BaseModel)])
def test_every_field_of_every_section_is_documented(section):
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert undocumented == [] or section is RunConfig
    assert (section.__doc__ or "").strip()


@pytest.mark.parametrize("name", registry.names())
def test_every_setting_of_every_method_is_documented(name):
    fields = registry.get(name).Config.model_fields
    assert {key: bool(field.description) for key, field in fields.items()} == dict.fromkeys(fields, True)


def test_every_declared_need_names_a_field():
    for cls in registry.methods().values():
        needs = [need for f in cls.Config.model_fields.values() for need in f.metadata if isinstance(need, Needs)]
        assert {need.field for need in needs} <= set(cls.Config.model_fields)


def test_a_third_party_method_validates_like_ours(third_party):
    values = {"run": {"dir": "x"}, "method": {"name": "odd", "oddness": 5}}
    config = parse(values)
    assert isinstance(config.method, OddConfig)
    assert config.method.oddness == 5
    assert parse(config.model_dump(mode="json")) == config
    for wrong, line in [
        ({"odness": 1}, "method.odness: unknown key; did you mean 'oddness'"),
        ({"oddness": 0}, "method.oddness: must be greater than or equal to 1; found 0"),
        ({"oddness": True}, "method.oddness: true and false are not allowed here; found true"),
        ({"spin": float("inf")}, "method.spin: a finite number is needed; found inf"),
    ]:
        with pytest.raises(UserError, match=line):
            parse({**values, "method": {"name": "odd", **wrong}})


def test_a_method_that_cannot_be_imported_is_a_clear_line(third_party):
    with pytest.raises(UserError, match="'broken': no_such_package:Method cannot be imported"):
        parse({"run": {"dir": "x"}, "method": {"name": "broken"}})


def test_a_setting_without_effect_is_refused():
    class Engine(Section):
        """Has a turbo."""

        turbo: bool = False
        kind: str = "a"
        pressure: Annotated[float, Needs("turbo")] = 1.0
        tuning: Annotated[int, Needs("kind", "b")] = 0

    assert Engine(pressure=1.0).pressure == 1.0  # the default is nobody's decision
    assert Engine(turbo=True, pressure=2.0).pressure == 2.0
    assert Engine(kind="b", tuning=2).tuning == 2
    with pytest.raises(ValueError, match=r"2\.0 given; it does nothing without turbo"):
        Engine(pressure=2.0)
    with pytest.raises(ValueError, match="2 given; it does nothing without kind=b"):
        Engine(tuning=2)


def test_methods_lists_every_method_with_its_paper():
    listed = call("methods")
    assert listed.code == 0
    for name, cls in registry.methods().items():
        assert f"  {name} " in listed.out
        assert cls.paper in listed.out


def test_methods_tells_defaults_ranges_and_docs_of_one():
    lines = call("methods", "dmd2").out.splitlines()
    assert "  critic_updates = 5  (from 1)" in lines
    assert '  rollout = "backward_simulation"  (backward_simulation, noised_data)' in lines
    assert "  pairs = null" in lines
    at = lines.index("  gan_weight = 0.0  (from 0)")
    assert lines[at + 1].startswith("      Weight of the student's adversarial loss")


def test_configs_lists_the_shipped_ones():
    assert call("configs").out.split() == sorted(shipped())
    assert "emoji32/dmd2" in shipped()


def test_a_config_is_found_by_its_name_with_or_without_its_ending():
    for word in ("emoji32/nothing", "configs/emoji32/nothing.yaml"):
        outcome = call("train", word)
        assert outcome.code == 2
        assert "shipped: demo/consistency" in outcome.err


def test_no_command_at_all_prints_help():
    outcome = call()
    assert outcome.code == 0
    assert "evaluate" in outcome.out
