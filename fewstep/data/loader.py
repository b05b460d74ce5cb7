"""Endless batches of a data set in a fixed order, from any position."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fewstep.data.batch import Batch
from fewstep.data.counter import random_words
from fewstep.data.samples import Dataset
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition

_AHEAD = 2  # batches a worker prepares before they are asked for


@dataclass(frozen=True)
class _Delivery:
    """What a worker sends: a batch, or the line of a user's mistake it met (an exception would arrive mangled).

    Arrays, because they travel by value; a tensor would travel as a handle that dies with its worker.
    """

    x: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    mistake: str = ""


@dataclass(frozen=True)
class _Requests:
    """The data set as torch's loader calls it: a whole batch for a list of indices."""

    dataset: Dataset

    def __getitems__(self, indices: Sequence[int]) -> _Delivery:
        try:
            samples = self.dataset.batch(indices)
        except UserError as error:
            return _Delivery(mistake=str(error))
        return _Delivery(samples.images.numpy(), samples.labels.numpy() if samples.labels is not None else None)


class Loader:
    """Iterates over `Batch` for ever, from `position` on.

    A finite set is read in a new order every epoch, which follows from the seed and the epoch's number; an endless set
    is read index by index, so it never repeats. The batches of all processes side by side are the samples at positions
    `position` to `position + world * batch_size - 1`, a contiguous part for each rank: two processes see what one with
    twice the batch sees. Nothing is drawn from torch's global generator.

    Args:
        dataset: where samples come from.
        batch_size: samples per batch of this process.
        seed: decides the order of a finite set.
        rank: number of this process.
        world: number of processes.
        workers: processes that prepare batches; 0 prepares them here.
        position: samples that all processes together have already seen.

    Attributes:
        position: samples that all processes together have been handed; what workers hold ready does not count. Set
            it before iterating to go on from there.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        position: int = 0,
    ) -> None:
        assert batch_size > 0
        assert 0 <= rank < world
        assert workers >= 0
        assert position >= 0
        self.dataset, self.position = dataset, position
        self._batch_size, self._seed, self._workers = batch_size, seed, workers
        self._rank, self._world = rank, world

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: `Loader(..., position=state["samples"])` goes on with the very next batch."""
        return {"samples": self.position}

    def __iter__(self) -> Iterator[Batch]:
        position = self.position
        for indices, delivery in zip(self._indices(position), self._deliveries(position), strict=True):
            if delivery.x is None:
                raise UserError(delivery.mistake)
            labels = delivery.labels
            condition = Condition.none() if labels is None else Condition.of_labels(torch.from_numpy(labels))
            position += self._world * self._batch_size
            self.position = position
            yield Batch(torch.from_numpy(delivery.x), condition, torch.tensor(indices))

    def _indices(self, position: int) -> Iterator[list[int]]:
        """Sample indices of this process's batches from a global position on."""
        while True:
            first = position + self._rank * self._batch_size
            places = np.arange(first, first + self._batch_size)
            yield sample_indices(places, self._seed, self.dataset.length).tolist()
            position += self._world * self._batch_size

    def _deliveries(self, position: int) -> Iterator[_Delivery]:
        requests = _Requests(self.dataset)
        if self._workers:
            return _from_workers(requests, self._indices(position), self._workers)
        return map(requests.__getitems__, self._indices(position))


def sample_indices(places: NDArray[np.int64], seed: int, length: int | None) -> NDArray[np.int64]:
    """Indices of the samples at `places` `(B,)` of the endless sequence of a set with `length` samples."""
    if length is None:
        return places
    epochs, within = np.divmod(places, length)
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = epoch_order(seed, int(epoch), length)[within[chosen]]
    return out


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """A permutation of `length` samples: their order when each is given a hash of (seed, epoch, index)."""
    keys = random_words(seed, f"order of epoch {epoch}", np.arange(length, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def _from_workers(requests: _Requests, indices: Iterator[list[int]], workers: int) -> Iterator[_Delivery]:
    """Deliveries in the order of `indices`, made by `workers` processes."""
    # Workers are forked where that is safe and cheap: they use NumPy and single-threaded torch on the CPU, never a
    # device. Python warns about any fork beside threads; torch's own default is the same and is told the same.
    loader = DataLoader(
        requests,  # pyright: ignore[reportArgumentType]
        batch_sampler=indices,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=_AHEAD,
        collate_fn=_as_is,  # pyright: ignore[reportArgumentType]
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        worker_init_fn=partial(_leave_with, os.getpid()),
        generator=torch.Generator(),  # else the global generator would move
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        deliveries = iter(loader)
    while True:
        try:
            delivery = next(deliveries)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
                raise
            raise RuntimeError(
                f"a data loader worker died (out of memory?); data.workers=0 shows why: {error}"
            ) from error
        yield delivery


def _leave_with(parent: int, worker: int) -> None:
    """Makes a worker end within a second of its parent, even when that was killed while the worker had data to hand."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name=f"parent of worker {worker}", daemon=True).start()


def _as_is(delivery: _Delivery) -> _Delivery:
    return delivery
