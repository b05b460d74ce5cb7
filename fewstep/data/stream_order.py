"""The order in which a stream is read: close to how it lies, so that little is read twice, and yet mixed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fewstep.data.counter import random_words

Whole = NDArray[np.int64]


class StreamOrder:
    """A shuffle of blocks and of a buffer within, as a pure function of seed and position.

    Each epoch puts the blocks (what is read at once: a row group, a tar file) in an order of its own, one after
    another, and cuts that sequence into windows of `buffer` pictures, each of which is mixed. So a window needs the
    blocks that it covers and no others, and where a run stands is one number: nothing has to be read or drawn again
    to go on from any position.

    With mirrored samples, an epoch is two rounds of all pictures, each in an order of its own. A hash says for each
    picture whether it is mirrored in the first round; it is the other way round in the second.

    Args:
        sizes: pictures in each block.
        buffer: pictures that are mixed with each other; 1 mixes blocks alone.
        flip: whether every picture appears a second time, mirrored.
    """

    def __init__(self, sizes: Sequence[int], buffer: int, flip: bool = False) -> None:
        assert buffer > 0
        self._sizes, self._buffer, self._flip = np.array(sizes, dtype=np.int64), buffer, flip
        self._firsts = _starts(self._sizes)
        self._pictures = int(self._sizes.sum())

    def indices(self, places: Whole, seed: int) -> Whole:
        """Indices of the samples at `places` `(B,)` of the endless sequence; from the pictures' number on, mirrored."""
        rounds, within = np.divmod(places, self._pictures)
        out = np.empty_like(places)
        for number in np.unique(rounds):
            chosen = rounds == number
            pictures = self._laid(seed, int(number), self._mixed(seed, int(number), within[chosen]))
            out[chosen] = pictures + self._pictures * self._mirrored(seed, int(number), pictures)
        return out

    def _mixed(self, seed: int, number: int, places: Whole) -> Whole:
        """Where in the row of blocks the samples at `places` of a round come from."""
        windows, within = np.divmod(places, self._buffer)
        out = np.empty_like(places)
        for window in np.unique(windows):
            chosen, first = windows == window, int(window) * self._buffer
            size = min(self._buffer, self._pictures - first)
            out[chosen] = first + _permutation(seed, f"window {window} of round {number}", size)[within[chosen]]
        return out

    def _laid(self, seed: int, number: int, places: Whole) -> Whole:
        """The pictures at `places` of the row of blocks."""
        order = _permutation(seed, f"blocks of round {number}", len(self._sizes))
        starts = _starts(self._sizes[order])
        slots = np.searchsorted(starts, places, side="right") - 1
        return self._firsts[order[slots]] + places - starts[slots]

    def _mirrored(self, seed: int, number: int, pictures: Whole) -> Whole:
        if not self._flip:
            return np.zeros_like(pictures)
        epoch, second = divmod(number, 2)
        coins = random_words(seed, f"mirrored in epoch {epoch}", pictures.astype(np.uint64)) & np.uint64(1)
        return (coins.astype(np.int64) + second) % 2


def _starts(sizes: Whole) -> Whole:
    return np.cumsum(sizes) - sizes


@lru_cache(maxsize=8)
def _permutation(seed: int, stream: str, length: int) -> Whole:
    return np.argsort(random_words(seed, stream, np.arange(length, dtype=np.uint64)), kind="stable")
