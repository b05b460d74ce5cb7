"""`fewstep cache` with an encoder of a few lines: what is stored, that it survives anything, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shlex import split

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.commands import cache as command
from fewstep.commands.cache import Request
from fewstep.data.cache_files import INDEX, NULL, read_index, shard_name
from fewstep.data.cached import CachedLatents
from fewstep.data.faults import DataFault
from fewstep.data.loader import Loader
from fewstep.data.sources import open_dataset
from fewstep.errors import RunError, UserError
from fewstep.models.autoencoder import Draws
from fewstep.models.conditioning import Condition
from tests.cli.lab import call
from tests.data.cache_lab import CAPTIONS, files_of, gone, shortened, teacher
from tests.data.fake_encoder import FakeEncoder


def test_the_samples_are_what_the_encoder_makes_of_the_set(request_, encoder, capsys):
    command.run(request_)
    assert capsys.readouterr().out == f"wrote 7 samples in 3 shards to {request_.out}\n"
    cache, plain = CachedLatents(request_.out), open_dataset("captions", path=request_.path, size=8)
    assert (cache.shape, cache.length, cache.classes) == ((4, 4, 4), 7, ())
    order = [6, 0, 3, 3, 1]
    batch, expected = cache.batch(order), plain.batch(order)
    assert torch.equal(batch.images, encoder.latents(expected.images))
    assert batch.condition is not None
    assert expected.captions is not None
    assert_same(batch.condition, encoder.prompts([*expected.captions]))
    assert cache.null is not None
    null = encoder.null().batched["encoder_hidden_states"]
    assert torch.equal(cache.null.batched["encoder_hidden_states"][:, :1], null)
    assert cache.null.batched["encoder_attention_mask"].tolist() == [[1, *[0] * 16]]


def assert_same(found: Condition, expected: Condition) -> None:
    """Equal values and kinds, the prompts padded to the longest of the set."""
    assert found.batched.keys() == expected.batched.keys()
    for key, value in expected.batched.items():
        assert torch.equal(found.batched[key], value), key
        assert found.batched[key].dtype == value.dtype
    assert found.shared.keys() == expected.shared.keys()
    assert torch.equal(found.shared["ids"], expected.shared["ids"])
    assert found.shared["shapes"] == [(1, 2, 2)]
    assert found.shared["added_cond_kwargs.resolution"] is None


def test_a_caption_is_encoded_once_a_shard(request_, encoder):
    command.run(request_)
    assert encoder.seen == [
        ("a red fish", "a bird"),
        ("a frog on a stone", "a bird"),
        ("an owl",),
        ("a red fish",),
    ]
    first = load_file(request_.out / shard_name(0))
    assert first["prompt"].tolist() == [0, 1, 0]
    assert len(first["condition.encoder_hidden_states"]) == 2


def test_a_sample_is_the_same_in_every_batch_and_process(request_):
    command.run(request_)
    cache = CachedLatents(request_.out)
    alone = cache.batch([1]).condition
    beside = cache.batch([3, 1]).condition
    assert alone is not None
    assert beside is not None
    for key, value in alone.batched.items():
        assert torch.equal(beside.batched[key][1:], value)
    plain, worked = (list(islice(Loader(cache, 2, seed=0, workers=workers), 5)) for workers in (0, 2))
    for one, other in zip(plain, worked, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.index, other.index)
        assert_same(other.condition, one.condition)


def test_mirrored_images_lie_beside_their_originals_and_share_their_prompt(request_, encoder):
    command.run(replace(request_, flip=True))
    cache, plain = CachedLatents(request_.out), open_dataset("captions", path=request_.path, size=8)
    images = plain.batch([0, 0, 5, 5]).images
    images[1::2] = images[1::2].flip(-1)
    assert cache.length == 14
    assert torch.equal(cache.batch([0, 1, 10, 11]).images, encoder.latents(images))
    assert load_file(request_.out / shard_name(0))["prompt"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_but_never_for_whole_numbers(request_, encoder, dtype):
    command.run(replace(request_, dtype=dtype))
    stored = load_file(request_.out / shard_name(0))
    kind = getattr(torch, dtype)
    assert stored["latents"].dtype == stored["condition.encoder_hidden_states"].dtype == kind
    cache = CachedLatents(request_.out)
    expected = encoder.latents(open_dataset("captions", path=request_.path, size=8).batch([2, 4]).images)
    batch = cache.batch([2, 4])
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images, expected.to(kind).float())
    assert batch.condition is not None
    assert batch.condition.batched["added_cond_kwargs.time_ids"].tolist() == [[1017.0, 1016.0]] * 2
    assert batch.condition.batched["encoder_attention_mask"].dtype == torch.int64


def test_the_index_states_what_there_is(request_):
    command.run(request_)
    index = json.loads((request_.out / INDEX).read_text())
    assert [one["samples"] for one in index["shards"]] == [3, 3, 1]
    assert index["lengths"] == {"condition.encoder_hidden_states": 17, "condition.encoder_attention_mask": 17}
    assert index["plan"]["teacher"] == request_.teacher
    assert (index["plan"]["dtype"], index["shape"], index["plan"]["samples"]) == ("float32", [4, 4, 4], 7)
    assert [len(one["sha256"]) for one in [index["null"], *index["shards"]]] == [64] * 4


def test_prompts_alone(request_, tmp_path, encoder):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    command.run(replace(request_, data="prompts", path=tmp_path / "prompts.txt", out=tmp_path / "prompts"))
    cache = CachedLatents(tmp_path / "prompts")
    batch = cache.batch([3, 0])
    assert (cache.shape, cache.length) == ((4, 4, 4), 7)
    assert batch.images.shape == (2, 4, 4, 4)
    assert bool(batch.images.isnan().all())
    assert batch.condition is not None
    assert_same(batch.condition, encoder.prompts([CAPTIONS[3], CAPTIONS[0]]))


def test_class_labels_are_stored_for_a_teacher_of_classes(request_, tmp_path, encoder):
    dit = teacher(tmp_path / "dit", "DiTTransformer2DModel")
    command.run(replace(request_, teacher=str(dit), data="emoji", path=None, samples=5, size=8))
    cache = CachedLatents(request_.out)
    plain = open_dataset("emoji", size=8).batch(range(5))
    batch = cache.batch(range(5))
    assert encoder.seen == []
    assert plain.labels is not None
    assert batch.labels is not None
    assert batch.labels.tolist() == plain.labels.tolist()
    assert cache.classes == open_dataset("emoji", size=8).classes
    assert cache.null is None


class Killed(FakeEncoder):
    """Kills its process when it has encoded so many batches of images."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def latents(self, images: Tensor, generator: Draws = None) -> Tensor:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().latents(images, generator)


def killed_after(batches: int, request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in a process of its own, to its sudden end."""
    with monkeypatch.context() as patch:
        patch.setattr(command, "open_encoder", lambda *_, **__: Killed(batches))
        process = multiprocessing.get_context("fork").Process(target=command.run, args=(request,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("batches", [0, 1, 2, 3, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(request_, encoder, monkeypatch, batches):
    command.run(request_)
    straight = replace(request_, out=request_.out.with_name("again"))
    killed_after(batches, straight, monkeypatch)
    with pytest.raises(UserError, match=r"again is unfinished; go on with: fewstep cache .*teacher .*again --data cap"):
        CachedLatents(straight.out)
    (straight.out / f".{shard_name(1)}.1.partial").write_bytes(b"half a sha")
    encoder.seen.clear()
    command.run(straight)
    assert len(encoder.seen) == [4, 4, 3, 3, 1][batches]  # what was whole is not made again
    assert files_of(straight.out) == files_of(request_.out)


def test_a_disk_that_takes_no_more_is_told_in_one_line(request_, encoder, monkeypatch):
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command.files, "save_file", full)
        with pytest.raises(
            RunError, match=r"cannot be written \(.*No space left on device\); the same command goes on"
        ):
            command.run(request_)
    assert sorted(files_of(request_.out)) == ["plan.json"]
    command.run(request_)
    assert CachedLatents(request_.out).length == 7


@dataclass(frozen=True)
class Rank:
    """One of several processes, as accelerate tells it."""

    process_index: int
    num_processes: int
    device: str = "cpu"

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        """The others come one after another here."""


def test_three_processes_make_the_bytes_of_one(request_, monkeypatch):
    command.run(request_)
    shared = replace(request_, out=request_.out.with_name("shared"))
    made = {}
    indexed = command._index
    monkeypatch.setattr(command, "_index", lambda out, maker: indexed(out, maker) if made else pytest.fail("too early"))
    command.files.write_plan(shared.out, command._plan(shared, Path(shared.teacher), command._dataset(shared)))
    for rank in (2, 1, 0):
        made = {path.name for path in shared.out.iterdir()}
        monkeypatch.setattr(command, "Accelerator", lambda rank=rank: Rank(rank, 3))
        command.run(shared)
        assert (shared.out / shard_name(rank)).is_file()
        assert shard_name(rank) not in made
    assert files_of(shared.out) == files_of(request_.out)


def test_a_finished_cache_is_left_alone(request_, encoder, capsys):
    command.run(request_)
    before = {path: path.stat().st_mtime_ns for path in request_.out.iterdir()}
    command.run(request_)
    assert capsys.readouterr().out.endswith("complete, 7 samples in 3 shards\n")
    assert {path: path.stat().st_mtime_ns for path in request_.out.iterdir()} == before


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [shard_name(1), NULL])
@pytest.mark.parametrize(
    ("damage", "line"),
    [(gone, "is missing"), (shortened, "is damaged ("), (flipped, "is damaged (its checksum is another)")],
)
def test_a_damaged_file_is_named_with_its_mend_which_mends_it(request_, name, damage, line):
    command.run(request_)
    whole = files_of(request_.out)
    damage(request_.out / name)
    with pytest.raises(UserError) as caught:
        open_dataset("cache", path=request_.out)
    told = str(caught.value)
    assert told.startswith(f"data.path: {request_.out / name} {line}")
    assert told.endswith(f"make it anew: {read_index(request_.out).plan.command(request_.out)}")
    assert "\n" not in told
    command.run(request_)
    assert files_of(request_.out) == whole


def test_the_stated_command_is_the_one_that_made_it(request_, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "run", asked.append)
    wanted = replace(request_, flip=True, options=("strict=true",))
    plan = command._plan(wanted, Path(wanted.teacher), command._dataset(wanted))
    assert call(*split(plan.command(wanted.out))[1:]).code == 0
    assert asked == [replace(wanted, samples=7)]


def test_sums_can_be_left_unchecked_but_never_sizes(request_):
    command.run(request_)
    flipped(request_.out / shard_name(2))
    open_dataset("cache", path=request_.out, options={"check": False})
    shortened(request_.out / shard_name(2))
    with pytest.raises(UserError, match=r"shard-00002.safetensors is damaged \(\d+ bytes, \d+ are stated\)"):
        open_dataset("cache", path=request_.out, options={"check": False})


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("damage", "line"), [(gone, "cannot be read any more"), (emptied, "is shorter than when")])
def test_a_shard_that_goes_while_training_is_a_fault_of_the_run(request_, damage, line):
    command.run(request_)
    cache = CachedLatents(request_.out)
    cache.batch([6])
    damage(request_.out / shard_name(2))
    with pytest.raises(DataFault, match=rf"shard-00002\.safetensors' {line}"):
        cache.batch([0, 6])
