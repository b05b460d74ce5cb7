"""Stored pairs: one draw of the regression for the whole batch, whoever shares it."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.pairs import Pair, Pairs, save_pairs
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng

ROWS = torch.arange(50.0)[:, None]
STORED = Pair(ROWS, -ROWS, Condition.of_labels(torch.arange(50)))


@pytest.fixture
def pairs() -> Pairs:
    return Pairs(STORED, torch.device("cpu"))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_draw_together_what_one_draws_alone(pairs, world):
    alone = pairs.draw(Rng(3), 8)
    shares = [pairs.draw(Rng(3, rank=rank, world=world), 8 // world) for rank in range(world)]
    assert torch.equal(torch.cat([one.noise for one in shares]), alone.noise)
    assert len(alone.noise) == 8


def test_the_parts_of_a_pair_stay_together(pairs):
    drawn = pairs.draw(Rng(0), 1000)
    assert torch.equal(drawn.x0, -drawn.noise)
    assert torch.equal(drawn.condition.batched["class_labels"], drawn.noise[:, 0].long())
    assert set(drawn.noise[:, 0].tolist()) == set(range(50)), "every row, with replacement"


def test_opening(tmp_path):
    path, labels = tmp_path / "pairs.safetensors", Condition.of_labels(torch.zeros(1, dtype=torch.int64))
    example = Batch(torch.zeros(1, 1), labels, torch.zeros(1))
    save_pairs(path, STORED)
    opened = Pairs.open(path, 0.25, example)
    assert opened is not None
    assert torch.equal(opened.stored.x0, STORED.x0)
    assert Pairs.open(path, 0.0, example) is None
    assert torch.equal(Pairs.required(path, example, "method.name=reflow").stored.noise, STORED.noise)
    with pytest.raises(UserError, match=r"method.pairs: missing; method.name=reflow needs the file"):
        Pairs.required(None, example, "method.name=reflow")
    with pytest.raises(UserError, match=r"method.pairs: missing; method.regression_weight needs"):
        Pairs.open(None, 0.25, example)
    with pytest.raises(UserError, match=r"samples of shape \(1,\), the data's are \(3,\)"):
        Pairs.open(path, 0.25, Batch(torch.zeros(1, 3), labels, torch.zeros(1)))
    with pytest.raises(UserError, match=r"pairs: .*pairs.safetensors has class labels, the data has none; make pairs"):
        Pairs.open(path, 0.25, Batch(torch.zeros(1, 1), Condition.none(), torch.zeros(1)))
