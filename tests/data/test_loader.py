"""The loader: an order that is fixed, complete, shared between ranks, and taken up again at any sample."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.digits import Digits
from fewstep.data.emoji import emoji32
from fewstep.data.loader import Loader, sample_indices
from fewstep.data.samples import Samples
from fewstep.errors import UserError


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def labels(batch: Batch) -> torch.Tensor:
    assert batch.condition.labels is not None
    return batch.condition.labels


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.x, second.x)
    assert torch.equal(labels(first), labels(second))


class Numbers:
    """Vectors that are their own index; index `trouble` raises, index `death` ends the process."""

    shape, classes = (1,), ()

    def __init__(self, length: int | None = None, trouble: int = -1, death: int = -1) -> None:
        self.length, self._trouble, self._death = length, trouble, death

    def batch(self, indices: Sequence[int]) -> Samples:
        if self._death in indices:
            os._exit(1)
        if self._trouble in indices:
            raise UserError("data.path: 'x.png' cannot be read")
        return Samples(torch.tensor(indices, dtype=torch.float32)[:, None])


def test_an_endless_set_is_read_index_by_index():
    loader = Loader(emoji32(), 5, seed=3)
    batches = take(loader, 3)
    assert [b.index.tolist() for b in batches] == [list(range(k, k + 5)) for k in (0, 5, 10)]
    assert batches[1].index.dtype == torch.int64
    direct = emoji32().batch(range(5, 10))
    assert torch.equal(batches[1].x, direct.images)
    assert direct.labels is not None
    assert torch.equal(labels(batches[1]), direct.labels)


def test_a_set_without_labels_gives_no_condition():
    (batch,) = take(Loader(Numbers(), 4, seed=0), 1)
    assert batch.condition.labels is None
    assert dict(batch.condition.batched) == {}


def test_every_epoch_shows_each_sample_once_in_another_order():
    loader = Loader(Numbers(length=21), 7, seed=0)
    epochs = [torch.cat([b.index for b in take(loader, 3)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again, other = (
        torch.cat([b.index for b in take(Loader(Numbers(length=21), 7, seed=s), 3)]).tolist() for s in (0, 1)
    )
    assert again == epochs[0]
    assert other != epochs[0]


def test_batches_run_across_the_end_of_an_epoch():
    loader = Loader(Numbers(length=10), 4, seed=0)
    seen = torch.cat([b.index for b in take(loader, 5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert len(take(Loader(Numbers(length=3), 8, seed=0), 1)[0].index) == 8


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_side_by_side_see_what_one_process_sees(world):
    whole = take(Loader(Digits(), 32, seed=1), 3)
    parts = [take(Loader(Digits(), 32 // world, seed=1, rank=rank, world=world), 3) for rank in range(world)]
    for step in range(3):
        assert torch.equal(torch.cat([part[step].x for part in parts]), whole[step].x)
        assert torch.equal(torch.cat([labels(part[step]) for part in parts]), labels(whole[step]))
        assert torch.equal(torch.cat([part[step].index for part in parts]), whole[step].index)


def test_the_state_counts_samples_of_all_ranks():
    loader = Loader(Digits(), 8, seed=0, rank=1, world=2)
    assert loader.state() == {"samples": 0}
    take(loader, 3)
    assert loader.state() == {"samples": 48}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_very_next_batch(workers):
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # start torch's threads before workers are forked
    whole = take(Loader(emoji32(length=50), 8, seed=0), 10)
    first = Loader(emoji32(length=50), 8, seed=0, workers=workers)
    for expected, batch in zip(whole[:4], take(first, 4), strict=True):
        assert_same(expected, batch)
    assert first.state() == {"samples": 32}  # what workers hold ready was never delivered
    second = Loader(emoji32(length=50), 8, seed=0, workers=workers, position=first.state()["samples"])
    for expected, batch in zip(whole[4:], take(second, 6), strict=True):
        assert_same(expected, batch)


def test_the_position_can_be_set_before_iterating():
    loader = Loader(Numbers(), 4, seed=0)
    loader.position = 100
    assert take(loader, 1)[0].index.tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_stands_still(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(Loader(Digits(), 4, seed=0, workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_stays_one_line(workers):
    loader = Loader(Numbers(trouble=9), 4, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"^data\.path: 'x\.png' cannot be read$"):
        take(loader, 5)
    assert loader.state() == {"samples": 8}


def test_a_dead_worker_is_reported():
    with pytest.raises(RuntimeError, match="a data loader worker died"):
        take(Loader(Numbers(death=9), 4, seed=0, workers=1), 5)


def killed_while_loading(pipe) -> None:
    batches = iter(Loader(emoji32(), 64, seed=0, workers=2))
    next(batches)
    pipe.send([child.pid for child in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_leave_when_their_parent_is_killed():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=killed_while_loading, args=(sender,))
    parent.start()
    workers = receiver.recv()
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, workers))


def test_the_order_of_a_finite_set_is_what_it_was():
    assert sample_indices(torch.arange(12).numpy(), 0, 6).tolist() == ORDER


ORDER = [3, 5, 0, 2, 1, 4, 1, 5, 2, 3, 0, 4]
