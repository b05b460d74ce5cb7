"""Learning rates, clipping, and averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.config import Optim
from fewstep.errors import UserError
from fewstep.models.players import Player
from fewstep.training.optim import average_gradients, gradient_norm, lr_factor, make_optimizers

TABLE = [
    (Optim(), 0, 1.0),
    (Optim(), 99, 1.0),
    (Optim(warmup=4), 0, 0.25),
    (Optim(warmup=4), 2, 0.75),
    (Optim(warmup=4), 3, 1.0),
    (Optim(warmup=4), 50, 1.0),
    (Optim(decay="linear"), 0, 1.0),
    (Optim(decay="linear"), 25, 0.75),
    (Optim(decay="linear"), 99, 0.01),
    (Optim(decay="cosine"), 0, 1.0),
    (Optim(decay="cosine"), 50, 0.5),
    (Optim(decay="cosine"), 25, 0.5 * (1 + math.sqrt(0.5))),
    (Optim(decay="linear", warmup=2), 0, 0.5),
    (Optim(decay="linear", warmup=20), 10, 0.55 * 0.9),
]


@pytest.mark.parametrize(("config", "step", "expected"), TABLE)
def test_the_share_of_the_peak_rate(config, step, expected):
    assert lr_factor(config, step, 100) == pytest.approx(expected, abs=1e-12)


def player(values: list[float]) -> Player:
    return Player({"w": nn.Parameter(torch.tensor(values))})


def test_a_step_clips_and_says_the_norm_before():
    one = player([0.0, 0.0])
    optimizer = make_optimizers({"a": one}, Optim(lr=0.1, clip=1.0))["a"]
    one.parameters["w"].grad = torch.tensor([3.0, 4.0])
    assert float(optimizer.step(1.0, 1.0)) == 5.0
    moment = optimizer.adamw.state[one.parameters["w"]]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.6, 0.8]))
    assert one.parameters["w"].grad is None


def test_no_clipping_leaves_the_gradient():
    one = player([0.0, 0.0])
    optimizer = make_optimizers({"a": one}, Optim(lr=0.1, clip=None))["a"]
    one.parameters["w"].grad = torch.tensor([30.0, 40.0])
    assert float(optimizer.step(1.0, None)) == 50.0
    torch.testing.assert_close(optimizer.adamw.state[one.parameters["w"]]["exp_avg"], torch.tensor([3.0, 4.0]))


def test_the_first_adam_step_is_the_rate_times_the_factor():
    one = player([1.0, -1.0])
    optimizer = make_optimizers({"a": one}, Optim(lr=0.1, clip=None))["a"]
    one.parameters["w"].grad = torch.tensor([2.0, -0.5])
    optimizer.step(0.5, None)
    torch.testing.assert_close(one.parameters["w"].detach(), torch.tensor([0.95, -0.95]))


def test_a_forgetful_optimizer_steps_as_a_new_one():
    """The first Adam step after `forget` has the size of the rate, whatever the gradients before were."""
    one, new = player([1.0]), player([1.0])
    optimizer, fresh = (make_optimizers({"a": each}, Optim(lr=0.1, clip=None))["a"] for each in (one, new))
    for gradient in (100.0, -30.0, 70.0):
        one.parameters["w"].grad = torch.tensor([gradient])
        optimizer.step(1.0, None)
    optimizer.forget()
    assert len(optimizer.adamw.state) == 0
    with torch.no_grad():
        one.parameters["w"].fill_(1.0)
    for factor in (1.0, 0.5):
        for each, its in ((one, optimizer), (new, fresh)):
            each.parameters["w"].grad = torch.tensor([2.0])
            its.step(factor, None)
        assert torch.equal(one.parameters["w"], new.parameters["w"])
    assert float(one.parameters["w"].detach()) == pytest.approx(0.85)
    state, wanted = optimizer.adamw.state[one.parameters["w"]], fresh.adamw.state[new.parameters["w"]]
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert int(state["step"]) == 2


def test_players_have_their_own_rates():
    from fewstep.config import PlayerOptim

    config = Optim(lr=0.1, weight_decay=0.01, players={"b": PlayerOptim(lr=0.2), "c": PlayerOptim(weight_decay=0.5)})
    made = make_optimizers({name: player([0.0]) for name in "abc"}, config)
    assert [made[name].lr for name in "abc"] == [0.1, 0.2, 0.1]
    assert [made[name].adamw.defaults["weight_decay"] for name in "abc"] == [0.01, 0.01, 0.5]


def test_an_override_for_nobody_is_refused():
    from fewstep.config import PlayerOptim

    with pytest.raises(UserError, match=r"optim.players.studnet: no such player; did you mean 'student'\?"):
        make_optimizers({"student": player([0.0])}, Optim(players={"studnet": PlayerOptim(lr=0.1)}))


def test_the_norm_of_parts_alone_has_nothing_to_send_from_the_host(monkeypatch):
    """A zero that was made there would hold the host at each step of a network that is spread whole."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda squared: None)
    part = nn.Parameter(torch.zeros(3, device="meta"))
    part.grad = torch.zeros_like(part)
    with _Places() as seen:
        gradient_norm([], [part])
    assert seen.places == {"meta"}


class _Places(TorchDispatchMode):
    """The devices of all that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.places |= {one.device.type for one in tree_leaves((args, out)) if isinstance(one, torch.Tensor)}
        return out


def test_one_process_has_nothing_to_average():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_gradients([parameter, nn.Parameter(torch.zeros(1))])
    assert parameter.grad.tolist() == [1.0, 2.0]
