"""A set that the run encodes itself: what a cache of it says, for any batch, worker and process."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from fewstep.commands import cache as command
from fewstep.data import encoding
from fewstep.data.batch import Batch
from fewstep.data.cached import CachedLatents
from fewstep.data.encoding import Encoded
from fewstep.data.loader import Loader
from fewstep.data.samples import Dataset
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from tests.data.cache_lab import CAPTIONS
from tests.data.fake_encoder import FakeEncoder


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """The longest prompt of an encoder that takes any."""
    monkeypatch.setattr(encoding, "_LONGEST", "w" * 40)


@pytest.fixture
def plain(request_) -> Dataset:
    return open_dataset("captions", path=request_.path, size=8)


def encoded(plain: Dataset, draws: int | None = None, at_once: int = 16, prompts: bool = True) -> Encoded:
    return Encoded.of(plain, FakeEncoder(), prompts, draws, at_once)


def read(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def latents(loader: Loader, count: int) -> Tensor:
    return torch.cat([batch.x for batch in read(loader, count)])


def assert_alike(one: Condition, other: Condition) -> None:
    """Equal, but for how far prompts are padded."""
    assert one.batched.keys() == other.batched.keys()
    for key, long in one.batched.items():
        short = other.batched[key]
        tokens = slice(None, short.shape[1])
        assert torch.equal(long[:, tokens], short), key
        assert not bool(long[:, short.shape[1] :].any()), key
    assert torch.equal(one.shared["ids"], other.shared["ids"])


def test_batches_are_those_of_a_cache(request_, plain):
    command.run(request_)
    cache, online = CachedLatents(request_.out), encoded(plain)
    assert (online.shape, online.length, online.classes) == (cache.shape, cache.length, cache.classes)
    assert online.null is not None
    assert cache.null is not None
    assert_alike(online.null, cache.null)
    for one, other in zip(read(Loader(online, 3, seed=4), 4), read(Loader(cache, 3, seed=4), 4), strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.index, other.index)
        assert_alike(one.condition, other.condition)
    assert_alike(online.batch([6, 0]).condition or Condition.none(), cache.batch([6, 0]).condition or Condition.none())


@pytest.mark.parametrize("draws", [None, 3])
def test_neither_workers_nor_parts_change_a_batch(plain, draws):
    straight = read(Loader(encoded(plain, draws), 4, seed=0), 4)
    for online, workers in ((encoded(plain, draws, at_once=3), 0), (encoded(plain, draws), 2)):
        for one, other in zip(straight, read(Loader(online, 4, seed=0, workers=workers), 4), strict=True):
            assert torch.equal(one.x, other.x)
            assert all(torch.equal(value, other.condition.batched[key]) for key, value in one.condition.batched.items())


def test_draws_belong_to_a_sample_s_place_in_the_run(plain):
    """Two processes draw what one does, a resumed loader what a straight one does, and a second epoch draws anew."""
    online, seven = encoded(plain, draws=3), len(CAPTIONS)
    straight = latents(Loader(online, 4, seed=0), 7)
    ranks = [read(Loader(online, 2, seed=0, rank=rank, world=2), 7) for rank in (0, 1)]
    assert torch.equal(straight, torch.cat([batch.x for pair in zip(*ranks, strict=True) for batch in pair]))
    assert torch.equal(straight[8:], latents(Loader(online, 4, seed=0, position=8), 5))
    one, two = read(Loader(online, seven, seed=0), 2)
    moved = one.x[one.index.argsort()] - two.x[two.index.argsort()]
    assert bool(moved.flatten(1).abs().amax(1).gt(0.01).all())
    assert not torch.equal(straight, latents(Loader(encoded(plain, draws=4), 4, seed=0), 7))
    modes = latents(Loader(encoded(plain), 4, seed=0), 7)
    assert float((straight - modes).std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float((straight - modes).mean())) < 0.01


def test_labels_stay_where_no_prompt_is_told():
    plain = open_dataset("emoji", size=8)
    online = encoded(plain, prompts=False)
    batch = next(iter(Loader(online, 3, seed=0)))
    assert batch.condition.labels is not None
    assert batch.condition.labels.tolist() == [int(one) for one in plain.batch(range(3)).labels]  # pyright: ignore[reportOptionalIterable]
    assert (online.classes, batch.x.shape) == (plain.classes, (3, 4, 4, 4))
    bare = next(iter(Loader(online.unlabelled(), 3, seed=0)))
    assert torch.equal(bare.x, batch.x)
    assert not bare.condition.batched


def test_prompts_alone_have_no_pixels(request_, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    online = encoded(open_dataset("prompts", path=tmp_path / "prompts.txt", size=8))
    batch = next(iter(Loader(online, 3, seed=0)))
    assert batch.x.shape == (3, 4, 4, 4)
    assert bool(batch.x.isnan().all())


class Changed(FakeEncoder):
    """One whose conditions are changed where a prompt is not empty."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.changes = changes

    def prompts(self, captions):
        told = super().prompts(captions)
        return replace(told, shared={**told.shared, **self.changes})


class LongNull(FakeEncoder):
    """Its null condition is as long as the longest prompt, as that of pipelines which pad nothing else."""

    def null(self):
        told = self._told(["w" * 40])
        mask = torch.arange(40)[None] < 1
        batched = {**told.batched, "encoder_attention_mask": mask.long()}
        return Condition(batched, told.shared)


def test_prompts_are_as_long_as_a_longer_null_condition(plain):
    online = Encoded.of(plain, LongNull(), True, None, 2)
    assert online.null is not None
    told = online.told(CAPTIONS)
    assert {key: value.shape[1:] for key, value in told.batched.items()} == {
        key: value.shape[1:] for key, value in online.null.batched.items()
    }


class Unmasked(FakeEncoder):
    def _told(self, captions):
        told = super()._told(captions)
        return Condition({k: v for k, v in told.batched.items() if "mask" not in k}, told.shared)


@pytest.mark.parametrize(
    ("encoder", "line"),
    [
        (Changed(shapes=[]), r"data\.name: the teacher's 'shapes' differs from prompt to prompt, which no batch can"),
        (Unmasked(), r"data\.name: the teacher's 'encoder_hidden_states' is of another length for some prompts, and"),
    ],
)
def test_conditions_that_no_batch_can_hold(plain, encoder, line):
    with pytest.raises(UserError, match=line):
        Encoded.of(plain, encoder, True, None, 4)


def test_the_resting_place_does_not_reach_the_cache(request_, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "open_encoder", lambda *_, **words: asked.append(words["rest"]) or FakeEncoder())
    one, two = replace(request_, encoders="host"), replace(request_, out=request_.out.with_name("two"))
    for request in (one, two):
        command.run(request)
    assert asked == [True, False]
    assert {p.name: p.read_bytes() for p in one.out.iterdir()} == {p.name: p.read_bytes() for p in two.out.iterdir()}


def test_a_cache_of_an_earlier_version_states_no_weights(request_):
    """And is gone on with, and opened, all the same."""
    command.run(request_)
    for name in ("plan.json", "index.json"):
        path = request_.out / name
        values = json.loads(path.read_text())
        (values if name == "plan.json" else values["plan"]).pop("weights")
        path.write_text(json.dumps(values))
    assert CachedLatents(request_.out).index.plan.weights == {}
    command.run(request_)
