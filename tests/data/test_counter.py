"""Counter-based random numbers: known answers, and what a generator must not do."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fewstep.data.counter import choices, mix, name_word, random_words, uniforms

N = 200_000
INDEX = np.arange(N, dtype=np.uint64)


def test_mix_is_splitmix64():
    states = np.array([0, 0x9E3779B97F4A7C15, 2 * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64)
    assert [hex(int(word)) for word in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_names_hash_as_their_sha256_starts():
    assert name_word("red apple").to_bytes(8, "little") == hashlib.sha256(b"red apple").digest()[:8]


def test_uniforms_fill_the_unit_interval_evenly():
    u = uniforms(0, "x", INDEX)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * N))
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert np.square(counts - N / 100).sum() / (N / 100) < 160  # chi-square, 99 degrees of freedom, p < 1e-4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, "x", 0), (0, "y", 0)),
        ((0, "x", 0), (1, "x", 0)),
        ((0, "x", 0), (0, "x", 1)),
        ((0, "x", 0), (2**63, "x", 0)),
    ],
)
def test_streams_seeds_and_neighbours_are_uncorrelated(first, second):
    a, b = (uniforms(seed, stream, INDEX + np.uint64(shift)) for seed, stream, shift in (first, second))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(N)


def test_a_number_depends_on_its_own_index_alone():
    whole = random_words(7, "x", INDEX[:1000])
    some = np.array([999, 3, 500], dtype=np.uint64)
    assert (random_words(7, "x", some) == whole[[999, 3, 500]]).all()


def test_choices_are_equally_likely_and_in_range():
    counts = np.bincount(choices(3, "x", INDEX, 7), minlength=7)
    assert len(counts) == 7
    assert np.square(counts - N / 7).sum() / (N / 7) < 30  # 6 degrees of freedom
