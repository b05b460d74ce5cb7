"""Features of real images on disk: never stale, never trusted blindly, never in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.emoji import emoji32
from fewstep.evaluation.cache import Cache, cache_folder, remembered
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import Features, Identity
from fewstep.evaluation.images import reference

PIXELS = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8)


class Counting:
    """Features that are pixels; counts its calls."""

    classes = None
    text = None
    device = torch.device("cpu")

    def __init__(self, logits: bool = False):
        self.identity = Identity("counting", "0" * 64, 4, "none")
        self.gives_logits, self.calls = logits, 0

    def __call__(self, images: Tensor) -> Features:
        self.calls += 1
        values = images.float().flatten(1)
        return Features(values, -values if self.gives_logits else None)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, told) -> Cache:
    return Cache(tmp_path / "kept", told.append)


def entries(cache: Cache) -> list[Path]:
    return list((cache.folder / "features").iterdir())


@pytest.mark.parametrize("logits", [True, False])
def test_a_second_look_is_a_read(cache, told, logits):
    network = Counting(logits)
    first, second = remembered(PIXELS, network, cache), remembered(PIXELS, network, cache)
    assert network.calls == 1
    assert torch.equal(first.values, second.values)
    assert (first.logits is None, second.logits is None) == (not logits, not logits)
    if first.logits is not None and second.logits is not None:
        assert torch.equal(first.logits, second.logits)
    assert len(entries(cache)) == 1
    assert told == []


@pytest.mark.parametrize("change", [{"sha256": "1" * 64}, {"size": 8}, {"resize": "other"}, {"name": "other"}])
def test_another_network_is_another_entry(cache, change):
    network = Counting()
    remembered(PIXELS, network, cache)
    network.identity = replace(network.identity, **change)
    remembered(PIXELS, network, cache)
    assert (network.calls, len(entries(cache))) == (2, 2)


def test_other_pixels_or_versions_are_another_entry(cache, monkeypatch):
    network = Counting()
    remembered(PIXELS, network, cache)
    remembered(PIXELS + 1, network, cache)
    remembered(PIXELS.view(2, 3, 2, 8), network, cache)
    monkeypatch.setattr("fewstep.evaluation.cache.version", lambda name: "99")
    remembered(PIXELS, network, cache)
    assert (network.calls, len(entries(cache))) == (4, 4)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def unsigned(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, flip, unsigned, lambda path: path.write_bytes(b"")])
def test_a_damaged_entry_is_told_of_and_made_again(cache, told, damage):
    network = Counting()
    first = remembered(PIXELS, network, cache)
    damage(entries(cache)[0])
    assert torch.equal(remembered(PIXELS, network, cache).values, first.values)
    assert network.calls == 2
    assert len(told) == 1
    assert "is damaged" in told[0]
    remembered(PIXELS, network, cache)
    assert network.calls == 2


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, told):
    (tmp_path / "file").write_text("")
    seen = remembered(PIXELS, Counting(), Cache(tmp_path / "file", told.append))
    assert torch.equal(seen.values, PIXELS.float().flatten(1))
    assert "cannot be written" in told[0]


def test_a_reference_from_the_cache_is_the_same(cache, monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.images._CHUNK", 8)
    network, data = extractor("classifier"), emoji32()
    plain = reference(data, 12, 0, network, floor=True)
    first = reference(data, 12, 0, network, floor=True, cache=cache)
    again = reference(data, 12, 0, network, floor=True, cache=cache)
    assert len(entries(cache)) == 4  # chunks of 8 and 4, twice
    assert plain.sha256 == first.sha256 == again.sha256
    for one in (first, again):
        assert torch.equal(one.view.features.values, plain.view.features.values)
        assert one.floor is not None
        assert plain.floor is not None
        assert torch.equal(one.floor.features.values, plain.floor.features.values)


def test_the_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "fewstep"
