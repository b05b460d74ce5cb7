"""What `fewstep cache` refuses to make, and what is no cache: one clear line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.commands import cache as command
from fewstep.commands.cache import Request
from fewstep.data.cache_files import INDEX, PLAN, shard_name
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from tests.data.cache_lab import files_of
from tests.data.fake_encoder import FakeEncoder


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: replace(r, dtype="float16"), r"was begun otherwise \(dtype was 'float32', is 'float16'\)"),
        (lambda r: replace(r, batch=3), r"was begun otherwise \(batch was 2, is 3\).*go on with: fewstep cache "),
        (lambda r: replace(r, size=4), r"size was 8, is 4"),
        (lambda r: replace(r, samples=5), r"samples was 7, is 5"),
        (lambda r: recaptioned(r), r"contents was '"),
        (lambda r: replace(r, data="cache"), r"--data: cache is what this command makes"),
        (lambda r: replace(r, data="captionz"), r"no data set 'captionz'.*did you mean 'captions'"),
        (lambda r: replace(r, samples=8), r"--samples: 8 given, captions has 7"),
        (lambda r: replace(r, data="emoji", path=None), r"--samples: missing; emoji is endless"),
        (lambda r: replace(r, data="digits", path=None), r"--data: .* is told prompts, and digits has no captions"),
        (lambda r: replace(r, options=("flip=true",)), r"--option flip: mirrored images are made by --flip"),
        (lambda r: replace(r, options=("flip",)), r"--option 'flip': give KEY=VALUE"),
        (lambda r: replace(r, options=("strict=[",)), r"--option 'strict=\[': its value is no YAML"),
        (lambda r: replace(r, options=("stric=true",)), r"data\.options\.stric: unknown key.*did you mean 'strict'"),
        (lambda r: replace(r, out=r.path), r"cache: .*set is not empty, and no cache"),
        (lambda r: replace(r, size=None), r"data\.size: missing"),
        (lambda r: replace(r, teacher=str(r.out.parent / "set")), r"set: no model_index\.json; a diffusers pipeline"),
    ],
)
def test_what_cannot_be_made_gets_one_clear_line(request_, change, line):
    command.run(request_)
    before = files_of(request_.out)
    with pytest.raises(UserError, match=line) as caught:
        command.run(change(request_))
    assert "\n" not in str(caught.value)
    assert files_of(request_.out) == before


def recaptioned(request: Request) -> Request:
    assert request.path is not None
    (request.path / "0.txt").write_text("another fish")
    return request


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(values))

    return edit


def swapped(folder: Path) -> None:
    """A shard of the right name with other tensors."""
    save_file({"x": torch.zeros(1)}, folder / shard_name(0))
    index = json.loads((folder / INDEX).read_text())
    facts = command.files.facts_of(folder / shard_name(0))
    index["shards"][0] |= {"bytes": facts.bytes, "sha256": facts.sha256}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (edited(INDEX, format=2), r"index\.json is of format 2, 1 is read; make a new cache"),
        (edited(INDEX, shards=[{}]), r"index\.json is damaged"),
        (edited(INDEX, plan={}), r"index\.json is damaged"),
        (lambda folder: (folder / INDEX).write_text("{"), r"index\.json cannot be read"),
        (lambda folder: (folder / INDEX).write_text("[]"), r"index\.json is damaged"),
        (lambda folder: (folder / INDEX).unlink(), r"is unfinished; go on with: fewstep cache"),
        (lambda folder: [(folder / name).unlink() for name in (INDEX, PLAN)], r"holds no cache \(no index\.json\)"),
        (lambda folder: edited(INDEX, shards=[])(folder), r"has 0 samples, 7 are stated"),
        (swapped, r"shard-00000\.safetensors is damaged \(no latents\)"),
    ],
)
def test_a_cache_that_is_none_gets_one_clear_line(request_, change, line):
    command.run(request_)
    change(request_.out)
    with pytest.raises(UserError, match=line) as caught:
        open_dataset("cache", path=request_.out)
    assert "\n" not in str(caught.value)


class Varying(FakeEncoder):
    """Conditions that cannot be stored, each in its own way."""

    def __init__(self, change: Callable[[Condition], Condition]) -> None:
        super().__init__()
        self._change = change

    def prompts(self, captions: Sequence[str]) -> Condition:
        return self._change(super().prompts(captions))


def without(name: str) -> Callable[[Condition], Condition]:
    return lambda told: Condition({k: v for k, v in told.batched.items() if k != name}, told.shared)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without("encoder_attention_mask"), r"is told \['added_.* with a prompt and .* without; both must be the same"),
        (lambda told: Condition(told.batched, {**told.shared, "ids": torch.zeros(2, 2)}), r"'ids' differs from prompt"),
        (lambda told: Condition(told.batched, {**told.shared, "shapes": []}), r"'shapes' differs from prompt to"),
    ],
)
def test_conditions_that_cannot_be_stored_get_one_clear_line(request_, monkeypatch, change, line):
    monkeypatch.setattr(command, "open_encoder", lambda *_, **__: Varying(change))
    with pytest.raises(UserError, match=line):
        command.run(request_)


def test_prompts_of_several_lengths_need_a_mask(request_, monkeypatch):
    class Unmasked(FakeEncoder):
        def _told(self, captions: Sequence[str]) -> Condition:
            return without("encoder_attention_mask")(super()._told(captions))

    monkeypatch.setattr(command, "open_encoder", lambda *_, **__: Unmasked())
    with pytest.raises(UserError, match=r"'encoder_hidden_states' is of another length for some prompts, and no mask"):
        command.run(request_)


def test_another_size_than_the_caches_is_refused(request_):
    command.run(request_)
    assert open_dataset("cache", path=request_.out, size=8).length == 7
    with pytest.raises(UserError, match=r"data\.size: 16 given, the cache in .* is of images of 8; leave it out"):
        open_dataset("cache", path=request_.out, size=16)
