"""Every method by adapters: the base is left alone to the bit, all that should learn does, and a resumed run agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import registry
from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.models.test_families import _of_pipeline as family_case
from tests.pipelines.matrix import Latents
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, moved, sources

REFUSED = ("agd", "plug_and_play")
"""These bring adapters of their own."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{name: method for name, method in METHODS.items() if name not in REFUSED},
    "gdd_all": {"name": "gdd"},
    "gdd_frozen_features": {"name": "gdd", "train_features": False},
}
ALIKE = ("dmd2_gan", "f_distill", "flow_map_esd", "flow_map_psd", "gdd_all", "meanflow_data", "reflow", "scm_data")
"""Those that go through what another one goes through, or take long."""
FAMILIES = ("ddpm", "dit", "pixart")
RANK = 2


def adapted() -> Sources:
    """The five modes with a network as their teacher, and a student that is an adapter on it."""
    start = sources(network_teacher=True)
    assert isinstance(start.teacher, NetworkDenoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return replace(start, student=start.teacher.lora_view("student", RANK))


def run_of(settings: Mapping[str, Any], folder: Path) -> RunConfig:
    method = with_lora(settings)
    return config(method, folder, student={"lora": RANK, "steps": 1 if method["name"] == "reflow" else 2})


def with_lora(method: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings with its fake score as an adapter too, where it has one."""
    has = "fake_score_lora" in registry.get(method["name"]).Config.model_fields
    return {**method, "fake_score_lora": RANK} if has else dict(method)


def silent(state: TrainState, player: str) -> list[str]:
    """The player's parameters whose every gradient was zero, or that had none."""
    told = state.optimizers[player].adamw.state
    parameters = state.method.players[player].parameters
    return [n for n, p in parameters.items() if p not in told or not bool(told[p]["exp_avg_sq"].any())]


def check(make: Callable[[], Sources], run: RunConfig, room: Path) -> None:
    """Train, stop half-way, go on in a fresh state: what moves, what does not, and that both end the same."""
    start = make()
    # Whatever is added to a network, these stay the same objects.
    base = {n: p for n, p in start.student.network.named_parameters() if "lora_" not in n}
    kept, first = {n: p.detach().clone() for n, p in base.items()}, begin(run, start)
    before = everything(first)
    go(first, 4)
    checkpoint.save(room / "checkpoints", first)
    go(first)
    assert moved(before, everything(first)) >= set(first.method.players)
    assert [n for n, p in base.items() if not torch.equal(p, kept[n])] == []
    learners = [one for one in ("student", "fake_score") if one in first.method.players]
    trained = [n for one in learners for n in first.method.players[one].parameters]
    assert [n for n in trained if "lora_" not in n and ".second." not in n] == []
    assert [n for one in learners for n in silent(first, one)] == []
    second = begin(run, make())
    checkpoint.restore(checkpoint.list_checkpoints(room / "checkpoints")[-1], second)
    go(second)
    assert_same(everything(first), everything(second))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in SETTINGS])
def test_every_method_trains_adapters_and_nothing_else(tmp_path, name):
    check(adapted, run_of(SETTINGS[name], tmp_path), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_with_adapters_of_their_own_take_no_others(tmp_path, name):
    with pytest.raises(UserError, match=r"^student.lora: the method brings adapters of its own; leave out student.lo"):
        begin(run_of(METHODS[name], tmp_path), adapted())


def of_family(name: str) -> Sources:
    """A tiny teacher of a family on made-up latents, and a student that is an adapter on it, convolutions too."""
    one = family_case(name)
    teacher = one.denoiser.copy()
    teacher.adapters.convolutions = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = teacher.lora_view("student", RANK)
    return Sources(Latents(tuple(one.x.shape[1:]), one.condition), teacher, student)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "dit" else pytest.mark.slow) for n in FAMILIES])
def test_families_whose_pipelines_load_no_adapters_train_them(tmp_path, name):
    method = {"name": "dmd2", "critic_updates": 1, "fake_score_lora": RANK}
    run = config(method, tmp_path, student={"lora": RANK, "lora_convolutions": True, "steps": 2},
                 data={"batch_size": 2})  # fmt: skip
    check(partial(of_family, name), run, tmp_path)
