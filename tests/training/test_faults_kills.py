"""Killed with SIGKILL at any moment, again and again, and started again: the end is that of a run nobody touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.kills import LEAST, RUNS, largest_difference, measured


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sessions and /proc as Linux has them")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_points_ends_at_the_same_bits(tmp_path, name):
    result = measured(name, tmp_path, seed=0)
    print(f"{name}: {result}")
    assert result.largest_difference == 0
    assert result.same_state
    assert result.same_log
    assert result.refused == 0, "a checkpoint was torn"
    assert result.left_behind == 0, "a loader process outlived its run"
    assert result.lossless
    assert result.kills >= LEAST
    assert result.resumes >= LEAST // 2
    assert result.during["step"] > 0
    assert sum(result.during[phase] for phase in ("log", "grid", "save")) > 0, "no file was being written"
    assert list((tmp_path / "killed" / "checkpoints").glob(".partial*")) == []


def stored(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "player-student.safetensors")
    return folder


def test_one_bit_is_seen(tmp_path):
    weight = torch.randn(3, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other.view(torch.int32)[1] ^= 1
    one, same, near, more = (
        stored(tmp_path / name, **tensors)
        for name, tensors in {
            "one": {"w": weight},
            "same": {"w": weight},
            "near": {"w": other},
            "more": {"w": weight, "b": weight.clone()},
        }.items()
    )
    assert largest_difference(one, same) == (0, 1)
    assert 0 < largest_difference(one, near)[0] < 1e-6
    assert largest_difference(one, more)[0] == float("inf")
