"""Random numbers as a function of (seed, stream, index), so that sample i never depends on its neighbours.

A counter-based generator: each number is a hash of where it stands (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), here with the finaliser of SplitMix64 (Steele, Lea and Flood 2014). A whole batch is one vectorised
expression, and no generator has a state to save.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def mix(words: Words) -> Words:
    """SplitMix64's output function: every input bit changes about half of the output bits."""
    z = words + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY_2
    return z ^ (z >> np.uint64(31))


def word_of(value: int) -> Words:
    """One integer, reduced modulo 2**64, as an array so that NumPy wraps around without a warning."""
    return np.array([value & _MASK], dtype=np.uint64)


def name_word(name: str) -> int:
    """A stable 64-bit number of a string: the first eight bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def random_words(seed: int, stream: str, index: Words) -> Words:
    """`(N,)` independent 64-bit numbers of the stream named `stream` at the positions `index` `(N,)`."""
    key = mix(mix(word_of(seed)) ^ word_of(name_word(stream)))
    return mix(mix(index) ^ key)


def uniforms(seed: int, stream: str, index: Words) -> NDArray[np.float64]:
    """`(N,)` numbers in [0, 1) of the stream `stream` at the positions `index` `(N,)`."""
    return (random_words(seed, stream, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choices(seed: int, stream: str, index: Words, count: int) -> NDArray[np.int64]:
    """`(N,)` whole numbers in [0, count) of the stream `stream` at the positions `index` `(N,)`."""
    return np.minimum((uniforms(seed, stream, index) * count).astype(np.int64), count - 1)
