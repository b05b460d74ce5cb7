"""Small tables in parquet, and a file system that answers as one of the network does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import register_implementation
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from PIL import Image

from fewstep.data.captioned import Captioned
from fewstep.data.samples import Dataset
from fewstep.data.sources import open_dataset

CAPTIONS = tuple(f"caption {i}" for i in range(23))
CACHE = "datasets.config.HF_DATASETS_CACHE"
FILES = ("train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet")


def encoded(number: int, side: int = 10) -> bytes:
    """A PNG of noise, each number another."""
    noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def table(numbers: Sequence[int], captions: Sequence[str | None], side: int = 10) -> pa.Table:
    """A column of pictures as `datasets` stores them, and one of captions."""
    schema = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}).arrow_schema
    pictures = [{"bytes": encoded(i, side), "path": None} for i in numbers]
    return pa.table({"image": pictures, "text": list(captions)}, schema=schema)


def in_parquet(root: Path, captions: Sequence[str | None] = CAPTIONS, group: int = 3, side: int = 10) -> Path:
    """Three files, the first with fewer rows than the others, in row groups of `group`."""
    (root / "data").mkdir(parents=True)
    numbers = range(len(captions))
    cuts = (0, len(captions) // 4, len(captions) // 4 + len(captions) // 3, len(captions))
    for name, first, end in zip(FILES, cuts, cuts[1:], strict=False):
        pq.write_table(table(numbers[first:end], captions[first:end], side), root / "data" / name, row_group_size=group)
    return root


class _Ranges(AbstractBufferedFile):
    """A file of `Afar`, of which ranges are asked for."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        Afar.asked.append(end - start)
        return Afar.files[self.path][start:end]


class Afar(AbstractFileSystem):
    """Files that one can read parts of, and what was asked for so far."""

    protocol = "afar"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[int]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """As fsspec wants it."""
        name = str(self._strip_protocol(path))
        if name not in self.files:
            raise FileNotFoundError(path)
        return {"name": name, "size": len(self.files[name]), "type": "file"}

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> _Ranges:
        return _Ranges(self, path, mode, **kwargs)


register_implementation("afar", Afar, clobber=True)


def opened(path: Path, **options: object) -> Captioned:
    data = open_dataset("huggingface", path=path, size=8, options={"streaming": True, **options})
    assert isinstance(data, Captioned)
    return data


def plain(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Dataset:
    monkeypatch.setattr(CACHE, cache)
    return open_dataset("huggingface", path=path, size=8, options=options)


def in_feather(root: Path) -> Path:
    """Arrow's other format, in record batches of five."""
    root.mkdir()
    whole = table(range(len(CAPTIONS)), CAPTIONS)
    with pa.OSFile(str(root / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=5)
    return root


def whole_table() -> pa.Table:
    return table(range(len(CAPTIONS)), CAPTIONS)
