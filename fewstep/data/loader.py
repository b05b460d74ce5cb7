"""Endless batches of a data set in a fixed order, from any position."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.captioned import Captioned
from fewstep.data.counter import random_words
from fewstep.data.encoding import Encoded
from fewstep.data.faults import DataFault
from fewstep.data.samples import Dataset, SampleBatch, Unlabelled
from fewstep.data.stream_order import StreamOrder
from fewstep.data.workers import answers
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition


@dataclass(frozen=True)
class _Made:
    """A batch on its way: arrays, because they travel by value.

    Attributes:
        x: the samples.
        batched: the condition's tensors.
        shared: the condition's values that hold for the batch.
        captions: where they are still to be encoded.
    """

    x: NDArray[Any]
    batched: Mapping[str, NDArray[Any]]
    shared: Mapping[str, Any]
    captions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Refused:
    """Why there is no batch (an exception would arrive mangled).

    Attributes:
        kind: what to raise.
        line: what it says.
    """

    kind: type[Exception]
    line: str


@dataclass(frozen=True)
class _Requests:
    """The data set as a worker calls it: a whole batch for a list of indices."""

    dataset: Dataset
    captions: bool

    def __call__(self, indices: Sequence[int]) -> _Made | _Refused:
        try:
            return _packed(self.dataset.batch(indices), self.captions)
        except (UserError, DataFault) as error:
            return _Refused(type(error), str(error))
        except Exception:
            return _Refused(RuntimeError, traceback.format_exc())


def _packed(samples: SampleBatch, captions: bool) -> _Made:
    condition = samples.condition
    if condition is None:
        condition = Condition.none() if samples.labels is None else Condition.of_labels(samples.labels)
    batched = {key: value.numpy() for key, value in condition.batched.items()}
    shared = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in condition.shared.items()}
    return _Made(samples.images.numpy(), batched, shared, samples.captions if captions else None)


def _unpacked(made: _Made, indices: Sequence[int]) -> Batch:
    shared = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in made.shared.items()}
    condition = Condition({key: torch.from_numpy(value) for key, value in made.batched.items()}, shared)
    return Batch(torch.from_numpy(made.x), condition, torch.tensor(indices))


class Loader:
    """Iterates over `Batch` for ever, from `position` on.

    A finite set is read in a new order every epoch, which follows from the seed and the epoch's number; a stream in an
    order of its own that does so too; an endless set is read index by index, so it never repeats. The batches of all
    processes side by side are the samples at positions `position` to `position + world * batch_size - 1`, a contiguous
    part for each rank: two processes see what one with twice the batch sees. Nothing is drawn from torch's global
    generator.

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
        self._encoded = dataset if isinstance(dataset, Encoded) else None

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: `Loader(..., position=state["samples"])` goes on with the very next batch."""
        return {"samples": self.position}

    def __iter__(self) -> Iterator[Batch]:
        position = self.position
        for indices, delivery in zip(self._indices(position), self._deliveries(position), strict=True):
            if isinstance(delivery, _Refused):
                raise delivery.kind(delivery.line)
            places = self._places(position)
            position += self._world * self._batch_size
            self.position = position
            batch = _unpacked(delivery, indices)
            yield self._encoded.encoded(batch, delivery.captions, places) if self._encoded else batch

    def _indices(self, position: int) -> Iterator[list[int]]:
        """Sample indices of this process's batches from a global position on."""
        while True:
            yield self._samples(self._places(position)).tolist()
            position += self._world * self._batch_size

    def _places(self, position: int) -> NDArray[np.int64]:
        """This process's places `(B,)` in the endless sequence, of the batches from a global position on."""
        first = position + self._rank * self._batch_size
        return np.arange(first, first + self._batch_size)

    def _samples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the samples at `places` `(B,)` of the endless sequence."""
        order = _own_order(self.dataset)
        if order is not None:
            return order.indices(places, self._seed)
        return sample_indices(places, self._seed, self.dataset.length)

    def _deliveries(self, position: int) -> Iterator[_Made | _Refused]:
        """Made by the workers, up to what is encoded in this process."""
        source, captions = (self._encoded.pixels, True) if self._encoded else (self.dataset, False)
        if self._workers:
            return answers(_Requests(source, captions), self._indices(position), self._workers)
        return (_packed(source.batch(indices), captions) for indices in self._indices(position))


def _own_order(dataset: Dataset) -> StreamOrder | None:
    """The order of a set that is not read any sample after any other."""
    match dataset:
        case Unlabelled(dataset=inner) | Encoded(pixels=inner):
            return _own_order(inner)
        case Captioned(order=order):
            return order
    return None


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
