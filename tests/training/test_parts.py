"""Checkpoints in parts: each process writes and reads its own, for any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from fewstep.config import RunConfig
from fewstep.errors import RunError
from fewstep.models.shards import Box, local, whole
from fewstep.training import checkpoint, tensor_files
from fewstep.training.checkpoint import list_checkpoints, restore_last
from fewstep.training.integrity import Damaged, digest_of, read_facts
from fewstep.training.loop import TrainState
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, begin, config, go

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # torch's reader, in one process
]

NAMES = ("dmd2_gan", "consistency")  # one whose fake score and heads stay whole, and one with a target network
CUT = 3


def run_of(name: str, folder: Path, shard: str = "full") -> RunConfig:
    """Twelve samples a step, for one, two and three processes."""
    return config(METHODS[name], folder, data={"batch_size": 12}, train={"shard": shard})


def everything(state: TrainState) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by set and name."""
    sets = checkpoint._contents(state)
    return {f"{name} {key}": whole(value).clone() for name, content in sets for key, value in content.items()}


def keep(folder: Path, name: str, by: str, state: TrainState) -> None:
    tensors = everything(state)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(tensors, folder / f"{name}-{by}.safetensors")


def refuse(self: DTensor, *, grad_placements: object = None) -> Tensor:
    raise AssertionError("a tensor was gathered")


def without_gathering(do: Callable[[], object]) -> None:
    method, DTensor.full_tensor = DTensor.full_tensor, refuse
    try:
        do()
    finally:
        DTensor.full_tensor = method


def three(folder: Path) -> None:
    """Save in three parts, some of which are shorter and some empty, and read what one process has saved."""
    for name in NAMES:
        state = begin_rank(run_of(name, folder))
        go(state, CUT)
        without_gathering(partial(checkpoint.save, folder / f"{name}-by-three", state))
        keep(folder, name, "by-three", state)
        again = begin_rank(run_of(name, folder))
        without_gathering(partial(checkpoint.restore, list_checkpoints(folder / f"{name}-by-one")[0], again))
        keep(folder, name, "one-to-three", again)


def two(folder: Path) -> None:
    """Read the three parts in two, and in two processes that have all."""
    for name in NAMES:
        (saved,) = list_checkpoints(folder / f"{name}-by-three")
        for shard in ("none", "full"):
            state = begin_rank(run_of(name, folder, shard))
            without_gathering(partial(checkpoint.restore, saved, state))
            keep(folder, name, f"three-to-two-{shard}", state)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_parts_are_read_by_any_number_of_processes(tmp_path):
    """Three to two, three to one and one to three: weights, averages, moments and random streams, to the bit."""
    for name in NAMES:
        state = begin(run_of(name, tmp_path))
        go(state, CUT)
        checkpoint.save(tmp_path / f"{name}-by-one", state)
        keep(tmp_path, name, "by-one", state)
    assert launch(three, tmp_path, 3) == [0] * 3
    (tmp_path / "meet").unlink(missing_ok=True)
    assert launch(two, tmp_path) == [0, 0]
    for name in NAMES:
        by_one, by_three = (load_file(tmp_path / f"{name}-by-{count}.safetensors") for count in ("one", "three"))
        assert_equal(by_one, load_file(tmp_path / f"{name}-one-to-three.safetensors"))
        for shard in ("none", "full"):
            assert_equal(by_three, load_file(tmp_path / f"{name}-three-to-two-{shard}.safetensors"))
        (saved,) = list_checkpoints(tmp_path / f"{name}-by-three")
        alone = begin(run_of(name, tmp_path))
        checkpoint.restore(saved, alone)
        assert alone.step == CUT
        assert_equal(by_three, everything(alone))
        fresh = begin(run_of(name, tmp_path)).method.averages["ema"]
        checkpoint.load_average(saved, "ema", fresh)
        for key, value in fresh.shadow.items():
            assert torch.equal(value, by_three[f"average-ema {key}"])
    _look_at_the_files(tmp_path)


def _look_at_the_files(folder: Path) -> None:
    """What is in parts, what is whole, and that torch's own reader understands the parts."""
    (saved,) = list_checkpoints(folder / "dmd2_gan-by-three")
    parts = [f"rank-{rank:04d}-of-0003.safetensors" for rank in range(3)]
    spread = ("player-student", "optimizer-student", "average-ema")
    held = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    whole_ones = {f"{kind}-{name}" for kind in ("player", "optimizer") for name in ("fake_score", "discriminator")}
    assert held == (
        {f"{name}/{part}" for name in spread for part in parts}
        | {f"{name}.safetensors" for name in whole_ones}
        | {"rng.safetensors", "state.json"}
    )
    facts = read_facts(saved)
    assert facts["sha256"] == {file: checkpoint.sha256(saved / file) for file in held - {"state.json"}}
    assert len(digest_of(facts, "average-ema")) == 64
    assert digest_of(facts, "rng") == facts["sha256"]["rng.safetensors"]
    stored = load_file(folder / "dmd2_gan-by-three.safetensors")
    sizes = [sum(value.numel() for value in load_file(saved / "player-student" / part).values()) for part in parts]
    of_student = {key: value for key, value in stored.items() if key.startswith("player-student ")}
    assert sum(sizes) == sum(value.numel() for value in of_student.values())
    assert max(sizes) < sum(sizes) / 2
    ours = {key.partition(" ")[2]: torch.zeros_like(value) for key, value in of_student.items()}
    load_distributed(ours, storage_reader=HuggingFaceStorageReader(str(saved / "player-student")), no_dist=True)
    assert all(torch.equal(value, of_student[f"player-student {key}"]) for key, value in ours.items())


def faults(folder: Path) -> None:
    """A disk that is full for one process, parts that one of them finds damaged, and folders that differ."""
    rank = dist.get_rank()
    state = begin_rank(run_of("consistency", folder))
    for _ in range(2):
        go(state, 1)
        checkpoint.save(folder / "saved", state)
    kept = everything(state)
    go(state, 1)
    _one_disk_is_full(folder / "saved", state)
    read, told = 0, []
    original = tensor_files._Piece.read

    def counted(self: tensor_files._Piece, wanted: Box) -> Tensor:
        nonlocal read
        out = original(self, wanted)
        read += out.numel()
        return out

    tensor_files._Piece.read = counted
    again = begin_rank(run_of("consistency", folder))
    assert restore_last(folder / "saved", again, told.append) == folder / "saved" / "step-00000002"
    assert told == []
    now = everything(again)
    assert [key for key in kept if not torch.equal(kept[key], now[key])] == []
    own = sum(local(value).numel() for _, content in checkpoint._contents(again) for value in content.values())
    assert read == own, "no process reads what it does not keep"
    if rank == 0:
        part = folder / "saved" / "step-00000002" / "average-ema" / "rank-0001-of-0002.safetensors"
        part.write_bytes(part.read_bytes()[:-4] + b"torn")
    dist.barrier()
    again = begin_rank(run_of("consistency", folder))
    assert restore_last(folder / "saved", again, told.append) == folder / "saved" / "step-00000001"
    assert again.step == 1
    (text,) = told
    assert "average-ema/rank-0001-of-0002.safetensors: damaged or missing" in text
    assert text.endswith("going back to the one before")
    with pytest.raises(RunError, match=r"not every process finds the same checkpoints in .* all machines must see one"):
        restore_last(folder / ("saved" if rank else "elsewhere"), again, told.append)
    if rank == 0:
        (folder / "saved" / "step-00000001" / "rng.safetensors").unlink()
    dist.barrier()
    with pytest.raises(Damaged, match=r"rng.safetensors: damaged or missing; .* and no other is whole; remove"):
        restore_last(folder / "saved", again, told.append)


def _one_disk_is_full(saved: Path, state: TrainState) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    original = tensor_files.save_file
    if dist.get_rank() == 1:
        tensor_files.save_file = full
    with pytest.raises(RunError, match=r"step-00000003 cannot be written \(No space left .*\); .* from step-00000002"):
        checkpoint.save(saved, state)
    tensor_files.save_file = original
    dist.barrier()
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_faults_of_one_process_are_those_of_all(tmp_path):
    assert launch(faults, tmp_path) == [0, 0]
    facts = json.loads((tmp_path / "saved" / "step-00000002" / "state.json").read_text())
    assert facts["step"] == 2


def test_a_part_that_the_header_does_not_tell_of_is_no_silence(tmp_path):
    """Two rows of four are there: reading all must not give what memory happens to hold."""
    header = {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}', "shapes": '{"w": [4, 3]}'}
    save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "a.safetensors", header)
    with tensor_files.opened([tmp_path / "a.safetensors"]) as stored:
        assert stored.shapes == {"w": (4, 3)}
        part = Box((1, 1), (1, 2))
        assert stored.read("w", part).tolist() == [[4.0, 5.0]]
        assert stored.read("w", replace(part, size=(1, 1))).tolist() == [[4.0]]
        with pytest.raises(AssertionError, match="w: a part is missing"):
            stored.read("w")
