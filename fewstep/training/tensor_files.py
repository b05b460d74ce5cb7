"""Named tensors in safetensors files: whole in one file, or one file a process with its parts, read by slices.

A part's file is what `torch.distributed.checkpoint` writes and reads as `HuggingFaceStorageWriter` and `-Reader`
(`save_distributed=True`): safetensors whose header says under `DCP_SHARDING_INFO` where each piece begins. Its own
planners are not used: they exchange pickled plans, hold a process's part a second time as the bytes of a file, and end
a full disk in an exception of their own. Nor does their header know how large a whole is, so that a missing file goes
unseen; the key `shapes` here tells it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.models.shards import Box, box, is_spread, local
from fewstep.training.integrity import sha256

_BEGINS, _SHAPES = "DCP_SHARDING_INFO", "shapes"


def write(folder: Path, name: str, content: Mapping[str, Tensor], rank: int, world: int) -> dict[str, str]:
    """Write this process's share of `content`, through to the disk; the checksums of its files by their place.

    Where a tensor is spread, every process writes its parts, and the first one besides what all have; nothing is
    gathered. Else the first one writes all.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    spread = any(is_spread(value) for value in content.values())
    if rank and not spread:
        return {}
    own = {key: value for key, value in content.items() if not rank or is_spread(value)}
    if not spread:
        return {f"{name}.safetensors": _write(folder / f"{name}.safetensors", own, None)}
    (folder / name).mkdir(exist_ok=True)
    file = f"{name}/rank-{rank:04d}-of-{world:04d}.safetensors"
    own = {key: value for key, value in own.items() if not rank or box(value).count}  # the last may have nothing
    begins = {key: {"saved_offsets": box(value).start} for key, value in own.items()}
    shapes = {key: tuple(value.shape) for key, value in content.items()}
    told = {"DCP_VERSION": "1.0", _BEGINS: json.dumps(begins), _SHAPES: json.dumps(shapes), "format": "pt"}
    return {file: _write(folder / file, own, told)}


def _write(path: Path, content: Mapping[str, Tensor], told: dict[str, str] | None) -> str:
    save_file({key: local(value).detach().cpu().contiguous() for key, value in content.items()}, path, told)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return sha256(path)


@dataclass(frozen=True)
class _Piece:
    """A tensor in a file, and its place in the whole."""

    file: Any
    key: str
    box: Box

    def read(self, wanted: Box) -> Tensor:
        """What it holds of `wanted`, which lies inside it."""
        if wanted == self.box:
            return self.file.get_tensor(self.key)
        return self.file.get_slice(self.key)[wanted.within(self.box)]


class Stored:
    """The tensors of open files, whichever way they are cut.

    Attributes:
        shapes: of the whole tensors, by name.
    """

    def __init__(self, files: Sequence[Any]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for file in files:
            told = file.metadata() or {}
            begins = json.loads(told.get(_BEGINS, "{}"))
            self.shapes |= {key: tuple(shape) for key, shape in json.loads(told.get(_SHAPES, "{}")).items()}
            for key in file.keys():  # noqa: SIM118
                size = tuple(file.get_slice(key).get_shape())
                start = tuple(begins[key]["saved_offsets"]) if begins else (0,) * len(size)
                self.shapes.setdefault(key, size)
                self._pieces.setdefault(key, []).append(_Piece(file, key, Box(start, size)))

    def read(self, key: str, wanted: Box | None = None) -> Tensor:
        """A tensor, or what `wanted` says of it; of the files no more is read than that."""
        wanted = wanted or Box.whole(self.shapes[key])
        pieces = [(piece, piece.box.common(wanted)) for piece in self._pieces[key]]
        for piece, common in pieces:
            if common == wanted:
                return piece.read(wanted)
        pieces = [(piece, common) for piece, common in pieces if common.count]
        assert sum(common.count for _, common in pieces) == wanted.count, f"{key}: a part is missing"
        first = self._pieces[key][0]
        dtype = first.read(Box(first.box.start, (1,) * len(wanted.size))).dtype
        out = torch.empty(wanted.size, dtype=dtype)
        for piece, common in pieces:
            out[common.within(wanted)] = piece.read(common)
        return out


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[Stored]:
    """The tensors of these files, one set's."""
    with ExitStack() as stack:
        yield Stored([stack.enter_context(safe_open(path, framework="pt")) for path in paths])
