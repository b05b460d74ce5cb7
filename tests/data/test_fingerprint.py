"""What tells one checkpoint's weights from another's: their values, and nothing about their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.fingerprint import weights_digests
from fewstep.errors import UserError

PARTS = ("vae", "text_encoder")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"one": torch.randn(100, 80, generator=generator), "two": torch.randn(3, generator=generator)}


def saved(folder: Path, *files: dict[str, Tensor], part: str = "text_encoder", suffix: str = "") -> dict[str, str]:
    (folder / part).mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(files):
        save_file({k: v.clone() for k, v in content.items()}, folder / part / f"model-{number}{suffix}.safetensors")
    return dict(weights_digests(folder, PARTS))


def test_one_number_more_or_less_is_another_checkpoint(tmp_path, tensors):
    first = saved(tmp_path / "first", tensors)
    assert list(first) == ["text_encoder"]
    for place in (0, -1):
        changed = {key: value.clone() for key, value in tensors.items()}
        changed["one"].view(-1)[place] += 1e-3
        assert saved(tmp_path / str(place), changed) != first
    halved = {key: value.half() for key, value in tensors.items()}
    assert saved(tmp_path / "half", halved) != first
    assert saved(tmp_path / "less", {"two": tensors["two"]}) != first


def test_files_names_and_what_is_stored_twice_do_not_count(tmp_path, tensors):
    first = saved(tmp_path / "first", tensors)
    shards = {"a.one": tensors["one"]}, {"two": tensors["two"], "tied": tensors["two"]}
    assert saved(tmp_path / "shards", *shards) == first
    ids = {"position_ids": torch.arange(77)}
    assert saved(tmp_path / "ids", tensors | ids) == first
    saved(tmp_path / "first", {"one": tensors["one"].half()}, suffix=".fp16")
    saved(tmp_path / "first", {"one": tensors["one"].half()}, suffix=".fp16-00001-of-00001")
    assert dict(weights_digests(tmp_path / "first", PARTS)) == first


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_every_kind_of_number_that_checkpoints_are_stored_in(tmp_path, tensors, dtype):
    first = saved(tmp_path / "first", tensors | {"three": torch.arange(8).to(dtype)})
    assert (saved(tmp_path / "less", tensors) != first) == dtype.is_floating_point


def test_other_components_do_not_count_and_those_without_weights_have_none(tmp_path, tensors):
    first = saved(tmp_path / "one", tensors)
    saved(tmp_path / "one", tensors, part="unet")
    (tmp_path / "one" / "vae").mkdir()
    assert dict(weights_digests(tmp_path / "one", PARTS)) == first
    assert set(saved(tmp_path / "one", tensors, part="text_encoder_2")) == {"text_encoder", "text_encoder_2"}


def test_a_damaged_file_is_named(tmp_path, tensors):
    saved(tmp_path, tensors)
    path = tmp_path / "text_encoder" / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-0\.safetensors: the weights cannot be read: \d+ bytes, \d+ are stated"):
        weights_digests(tmp_path, PARTS)
