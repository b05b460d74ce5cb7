"""Single rows of a safetensors file, read by their place in it.

A mapped file that is cut short under a running process ends that process with a signal; what is read by its place
raises an error like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fewstep.data.faults import DataFault, vanished

_PREFIX = 8  # bytes that tell the length of the header
_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def bytes_of(self, axis: int) -> int:
        """The bytes of one entry of the tensor seen from `axis` on: 0 is all of it, 1 a row."""
        return math.prod(self.shape[axis:]) * self.dtype.itemsize


@dataclass(frozen=True)
class RowFile:
    """A safetensors file whose tensors have the sample first.

    Attributes:
        path: the file.
        places: where each tensor lies.
    """

    path: Path
    places: Mapping[str, _Place]

    @staticmethod
    def open(path: Path) -> RowFile:
        """The file, of which only the header is read.

        Raises:
            OSError: the system does not give it.
            ValueError: it is no safetensors file, or not all of it.
        """
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_PREFIX), "little")
            size = path.stat().st_size
            if not 0 < length <= size - _PREFIX:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(length))
        try:
            places = {name: _place(facts, _PREFIX + length) for name, facts in header.items() if name != "__metadata__"}
            end = max((_PREFIX + length + facts["data_offsets"][1] for facts in _tensors(header)), default=0)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no safetensors header ({error})") from error
        if end != size:
            raise ValueError(f"{size} bytes, {end} are stated")
        return RowFile(path, places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a tensor."""
        return self.places[name].shape

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """The rows `(len(numbers), *)` of a tensor.

        Raises:
            DataFault: the file cannot be read any more, or has become shorter.
        """
        place, size = self.places[name], self.places[name].bytes_of(1)
        content = self._read([place.start + number * size for number in numbers], size)
        return torch.frombuffer(content, dtype=place.dtype).view(len(numbers), *place.shape[1:])

    def whole(self, name: str) -> Tensor:
        """A tensor of any shape.

        Raises:
            DataFault: as `rows`.
        """
        place = self.places[name]
        content = self._read([place.start], place.bytes_of(0))
        return torch.frombuffer(content, dtype=place.dtype).view(place.shape)

    def ends(self, name: str, size: int) -> bytes:
        """The first and the last `size` bytes of a tensor, or all of it twice where it is shorter.

        Raises:
            DataFault: as `rows`.
        """
        place = self.places[name]
        length = place.bytes_of(0)
        size = min(size, length)
        return bytes(self._read([place.start, place.start + length - size], size))

    def _read(self, starts: Sequence[int], size: int) -> bytearray:
        """The `size` bytes from each of `starts` on."""
        content = bytearray()
        try:
            with self.path.open("rb") as stream:
                for start in starts:
                    stream.seek(start)
                    content += stream.read(size)
        except OSError as error:
            raise vanished(self.path, error) from error
        if len(content) != len(starts) * size:
            raise DataFault(f"data.path: {str(self.path)!r} is shorter than when the run began; put it back")
        return content


def _tensors(header: Mapping[str, Mapping[str, list[int]]]) -> list[Mapping[str, list[int]]]:
    return [facts for name, facts in header.items() if name != "__metadata__"]


def _place(facts: Mapping[str, object], origin: int) -> _Place:
    shape, offsets = facts["shape"], facts["data_offsets"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    return _Place(_TYPES[str(facts["dtype"])], tuple(shape), origin + offsets[0])
