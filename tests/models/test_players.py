"""Averages of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.models.players import Average, Player


def test_the_warm_up_and_the_decay():
    weight = nn.Parameter(torch.zeros(1))
    average = Average.of(Player({"w": weight}), 0.5)
    expected, found = 0.0, []
    for n in range(12):
        with torch.no_grad():
            weight.fill_(float(n + 1))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        found.append(float(average.shadow["w"]))
    assert found[0] == pytest.approx(0.9)
    assert found[1] == pytest.approx(2 / 11 * 0.9 + 9 / 11 * 2)
    assert found[-1] == pytest.approx(expected, rel=1e-6)
    assert average.updates == 12


def test_without_warm_up_the_decay_holds_from_the_start():
    weight = nn.Parameter(torch.ones(3))
    average = Average.of(Player({"w": weight}), 0.9, warmup=False)
    with torch.no_grad():
        weight.fill_(2.0)
    average.update()
    torch.testing.assert_close(average.shadow["w"], torch.full((3,), 1.1))


def test_inside_the_swap_the_player_is_its_average():
    weight = nn.Parameter(torch.ones(2))
    average = Average.of(Player({"w": weight}), 0.9)
    with torch.no_grad():
        weight.add_(1)
    with average.swapped():
        assert weight.tolist() == [1.0, 1.0]
    assert weight.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="inside"), average.swapped():
        raise RuntimeError("inside")
    assert weight.tolist() == [2.0, 2.0]
    assert average.shadow["w"].tolist() == [1.0, 1.0]


def test_an_average_of_bf16_weights_is_float32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = Average.of(Player({"w": weight}), 0.999, warmup=False)
    with torch.no_grad():
        weight.fill_(2.0)
    average.update()
    assert average.shadow["w"].dtype == torch.float32
    assert float(average.shadow["w"]) == pytest.approx(1.001, abs=1e-6)
    with average.swapped():
        assert weight.dtype == torch.bfloat16


def test_an_average_starts_anew_at_the_player_s_weights():
    weight = nn.Parameter(torch.zeros(2))
    average = Average.of(Player({"w": weight}), 0.5)
    shadow = average.shadow["w"]
    for value in (1.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
    assert shadow.tolist() != [3.0, 3.0]
    average.restart()
    assert shadow.tolist() == [3.0, 3.0], "the same tensor, which a target network may hold"
    assert average.updates == 0
    with torch.no_grad():
        weight.fill_(5.0)
    assert shadow.tolist() == [3.0, 3.0], "a copy, no view of the weights"
    average.update()
    assert shadow.tolist() == pytest.approx([3 * 0.1 + 5 * 0.9] * 2), "the warm-up starts anew too"


def test_an_average_in_float32_restarts_from_bf16_weights():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = Average.of(Player({"w": weight}), 0.9)
    with torch.no_grad():
        weight.fill_(2.0)
    average.restart()
    assert average.shadow["w"].dtype == torch.float32
    assert float(average.shadow["w"]) == 2.0


def test_a_follower_restarts_as_a_network_that_no_gradient_reaches():
    leader, shadow = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    average = Average(Player.of(leader), 0.9, dict(shadow.named_parameters()), warmup=False)
    x = torch.randn(4, 2)
    assert not torch.equal(leader(x), shadow(x))
    average.restart()
    torch.testing.assert_close(shadow(x), leader(x).detach(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in shadow.parameters())
