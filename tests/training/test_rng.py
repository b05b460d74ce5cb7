"""Draws that do not depend on the number of processes."""

from __future__ import annotations

import pytest
import torch

from fewstep.rng import Rng


def draws(rng: Rng, rows: int) -> list[torch.Tensor]:
    return [
        rng.normal(torch.empty(rows, 3, 2, 2)),
        rng.uniform(rows),
        rng.rows(100, rows),
        rng.normal(torch.empty(rows, 2, dtype=torch.float64)),
        torch.full((rows,), rng.integer(1000)),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_side_by_side_draw_what_one_draws(world):
    alone = draws(Rng(5), 8)
    parts = [draws(Rng(5, rank=rank, world=world), 8 // world) for rank in range(world)]
    for i, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole)


def test_a_restored_stream_goes_on():
    rng = Rng(3)
    draws(rng, 4)
    state = rng.state()
    expected = draws(rng, 4)
    other = Rng(99)
    other.restore(state)
    for one, two in zip(draws(other, 4), expected, strict=True):
        assert torch.equal(one, two)


def test_neither_stream_is_the_global_one():
    before = torch.random.get_rng_state()
    draws(Rng(0), 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_draws_are_normal_and_uniform():
    rng = Rng(0)
    normal, uniform = rng.normal(torch.empty(50_000, 2)), rng.uniform(100_000)
    assert normal.dtype == uniform.dtype == torch.float32
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.std()) == pytest.approx(1, abs=0.01)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.005)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1


def test_half_precision_gets_float32_noise():
    assert Rng(0).normal(torch.empty(2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert Rng(0).normal(torch.empty(2, 2, dtype=torch.float64)).dtype == torch.float64


def test_integers_cover_their_range():
    rng = Rng(1)
    assert {rng.integer(4) for _ in range(100)} == {0, 1, 2, 3}
    assert set(rng.rows(3, 100).tolist()) == {0, 1, 2}
