"""Tables that are read as they lie: their samples, their order, and their place in it."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.loader import Loader
from fewstep.data.samples import Dataset, Unlabelled
from fewstep.data.shards import ParquetShard
from fewstep.data.sources import open_dataset
from fewstep.data.stream import Stream
from fewstep.data.stream_order import StreamOrder
from fewstep.errors import UserError
from tests.data.stream_lab import (
    CAPTIONS,
    FILES,
    in_feather,
    in_parquet,
    opened,
    plain,
    whole_table,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(multiprocess|dill|datasets).*")


def saved(root: Path) -> Path:
    datasets.Dataset(whole_table()).save_to_disk(root, num_shards=2)
    return root


def saved_splits(root: Path) -> Path:
    whole = datasets.Dataset(whole_table())
    datasets.DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(root)
    return root


@pytest.mark.parametrize("build", [in_parquet, saved, saved_splits, in_feather])
def test_the_samples_are_those_of_the_set_without_a_stream(tmp_path, monkeypatch, build):
    path = build(tmp_path / "set")
    stream, whole = opened(path, flip=True), plain(path, tmp_path / "cache", monkeypatch, flip=True)
    assert (stream.shape, stream.length, stream.classes) == ((3, 8, 8), 46, ()) == (whole.shape, whole.length, ())
    ours, its = stream.batch(range(46)), whole.batch(range(46))
    assert torch.equal(ours.images, its.images)
    assert ours.captions == its.captions == CAPTIONS * 2
    assert torch.equal(stream.batch([40, 2, 21]).images, its.images[[40, 2, 21]])
    travelled = pickle.loads(pickle.dumps(stream))
    assert torch.equal(travelled.batch([22]).images, its.images[[22]])
    with pytest.raises(IndexError):
        stream.batch([46])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("buffer", [1, 7, 100])
def test_every_epoch_shows_each_sample_once_in_another_order(flip, buffer):
    sizes = (3, 0, 5, 1, 8, 8, 2)
    order, length = StreamOrder(sizes, buffer, flip), 27 * (2 if flip else 1)
    places = np.arange(3 * length)
    one = order.indices(places, seed=4)
    epochs = [one[k * length : (k + 1) * length].tolist() for k in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.indices(places, seed=5).tolist() != one.tolist()
    assert [int(order.indices(np.array([k]), seed=4)[0]) for k in (80, 3, 26, 27)] == one[[80, 3, 26, 27]].tolist()
    if flip:  # within a round each picture once, mirrored or not, half of them in all
        assert sorted(i % 27 for i in epochs[0][:27]) == list(range(27))
        assert 4 < sum(i >= 27 for i in epochs[0][:27]) < 23


def test_a_window_reads_the_blocks_it_covers_and_mixes_them():
    sizes = (4,) * 30
    order = StreamOrder(sizes, buffer=12).indices(np.arange(120), seed=0)
    windows = [order[k : k + 12] for k in range(0, 120, 12)]
    assert [len(set((window // 4).tolist())) for window in windows] == [3] * 10
    assert any((np.diff(window // 4) != 0).sum() > 4 for window in windows)
    blocks = [window // 4 for window in StreamOrder(sizes, buffer=1).indices(np.arange(120), seed=0).reshape(30, 4)]
    assert all(len(set(block.tolist())) == 1 for block in blocks)
    assert [int(block[0]) for block in blocks] != list(range(30))


def test_shards_come_in_an_order_that_the_seed_decides(tmp_path):
    data = opened(in_parquet(tmp_path / "set"), buffer=1)
    orders = [[int(i) for b in islice(Loader(data, 1, seed=seed), 23) for i in b.index] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(23))


def take(data: Dataset, count: int, size: int = 4, **facts: int) -> list[Batch]:
    return list(islice(Loader(data, size, seed=3, **facts), count))


def assert_same(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert [b.index.tolist() for b in one] == [b.index.tolist() for b in other]
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, other, strict=True))


def test_a_resumed_stream_is_the_straight_one_with_any_workers_and_processes(tmp_path):
    path = in_parquet(tmp_path / "set")
    straight = take(opened(path, buffer=6, flip=True), 14)  # a whole epoch of 46 samples, and more
    for position in (0, 4, 20, 44, 48):
        resumed = take(opened(path, buffer=6, flip=True), 14 - position // 4, position=position)
        assert_same(straight[position // 4 :], resumed)
    assert_same(straight[1:], take(Unlabelled(opened(path, buffer=6, flip=True)), 13, workers=2, position=4))
    ranks = [take(opened(path, buffer=6, flip=True), 14, size=2, rank=rank, world=2) for rank in (0, 1)]
    halves = [torch.cat([a.x, b.x]) for a, b in zip(*ranks, strict=True)]
    assert all(torch.equal(b.x, half) for b, half in zip(straight, halves, strict=True))


def test_workers_after_the_run_has_read_by_itself(tmp_path):
    """As every run does: a first sample is looked at before the workers are forked."""
    data = opened(in_parquet(tmp_path / "set"), buffer=6)
    expected = take(data, 12)
    assert_same(expected, take(data, 12, workers=2))


def test_few_blocks_are_held_and_none_is_read_twice_for_long(tmp_path, monkeypatch):
    data, reads, read = opened(in_parquet(tmp_path / "set"), buffer=6), Counter(), ParquetShard.read
    assert isinstance(data.gallery, Stream)

    def counted(shard: ParquetShard, block: int, columns: Sequence[str]) -> object:
        reads[shard.path, block] += 1
        return read(shard, block, columns)

    monkeypatch.setattr(ParquetShard, "read", counted)
    held = []
    for _ in islice(Loader(data, 1, seed=0), 23):
        held.append(sum(block.num_rows for block in data.gallery._held.values()))
    assert max(held) <= 6 + 2 * 3
    assert set(reads.values()) == {1}


def test_pictures_without_captions_are_left_out_and_counted(tmp_path, monkeypatch, caplog):
    captions = [None if i == 4 else " \u3000" if i in (8, 22) else f"caption {i}" for i in range(23)]
    path = in_parquet(tmp_path / "set", captions)
    with caplog.at_level(logging.WARNING, "fewstep.data"):
        data = opened(path)
    (told,) = caplog.messages
    assert told.startswith(f"warning: data.path: '{path}' has no caption for 3 of 23 pictures, such as '")
    assert told.endswith(f"{FILES[0]} row 4'; they are left out")
    whole = plain(path, tmp_path / "cache", monkeypatch)
    assert data.length == whole.length == 20
    assert data.batch(range(20)).captions == whole.batch(range(20)).captions
    assert torch.equal(data.batch(range(20)).images, whole.batch(range(20)).images)
    assert sorted(int(i) for b in take(data, 5) for i in b.index) == list(range(20))
    with pytest.raises(UserError, match=rf"no caption for 3 of 23 pictures, such as '.*{FILES[0]} row 4'; write them"):
        opened(path, strict=True)


def test_a_window_of_rows_that_mostly_lack_a_caption_is_held_whole(tmp_path, monkeypatch):
    """What is held is counted by its captioned pictures, and the others are let go."""
    path = in_parquet(tmp_path / "set", [f"caption {i}" if i % 3 == 1 else "" for i in range(23)])
    data, reads, read = opened(path, buffer=8), Counter(), ParquetShard.read
    assert isinstance(data.gallery, Stream)
    expected = data.batch(range(8))
    assert expected.captions == tuple(f"caption {i}" for i in range(1, 23, 3))

    def counted(shard: ParquetShard, block: int, columns: Sequence[str]) -> object:
        reads[shard.path, block] += 1
        return read(shard, block, columns)

    monkeypatch.setattr(ParquetShard, "read", counted)
    fresh = opened(path, buffer=8)
    assert isinstance(fresh.gallery, Stream)
    shuffled = [5, 0, 7, 2, 4, 1, 6, 3] * 2
    assert torch.equal(fresh.batch(shuffled).images, expected.images[shuffled])
    assert set(reads.values()) == {1}
    assert sum(block.num_rows for block in fresh.gallery._held.values()) == 8


def test_tar_files_are_read_in_the_same_order(tmp_path):
    from tests.data.test_captions import in_tars

    path = in_tars(tmp_path / "set", ("one", "two", "three", " ", "five", "six"))
    data = open_dataset("webdataset", path=path, size=8, options={"streaming": True, "buffer": 1})
    order = [int(i) for b in islice(Loader(data, 1, seed=0), 5) for i in b.index]
    assert sorted(order) == list(range(5))
    assert order == StreamOrder((2, 1, 2), 1).indices(np.arange(5), 0).tolist()
    assert open_dataset("webdataset", path=path, size=8).batch(order).captions == data.batch(order).captions
