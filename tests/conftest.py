"""Every test runs on one thread, away from every network, and with torch's random stream where it started."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)
# Where torch's compiler has been loaded before a process's first backward pass, its forks are refused theirs.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _own_device(request: pytest.FixtureRequest) -> None:
    """accelerate gives the CPU to all tests but those on CUDA, whose networks are there."""
    if request.node.get_closest_marker("gpu") is not None:
        request.getfixturevalue("monkeypatch").delenv("ACCELERATE_USE_CPU")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one state a process, and refuses another precision until it is forgotten."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
