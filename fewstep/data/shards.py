"""Shards of a table as they lie, in a folder or on the hub, of which one block of rows is read at a time.

Both kinds are opened anew for each block: loader workers are forked, and would share the place in an open file.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from fewstep.errors import UserError


@dataclass(frozen=True)
class Layout:
    """What a shard says of itself.

    Attributes:
        columns: their Arrow types by name.
        rows: in each block.
    """

    columns: Mapping[str, Any]
    rows: tuple[int, ...]


class Shard(Protocol):
    """A file of a table."""

    @property
    def path(self) -> str:
        """A path of this machine, or a URL that fsspec opens."""
        ...

    def layout(self) -> Layout:
        """Its columns and blocks.

        Raises:
            UserError: it is missing, or not whole.
        """
        ...

    def column(self, name: str) -> Iterator[Any]:
        """One column, block by block, as arrays of Arrow.

        Raises:
            Exception: whatever Arrow, the file system or the network raise.
        """
        ...

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """Those columns of a block, as a table or record batch of Arrow.

        Raises:
            Exception: as `column`.
        """
        ...


@dataclass(frozen=True)
class ParquetShard:
    """A parquet file: a block is a row group, whose columns lie apart, so that captions are read without pictures."""

    path: str

    def layout(self) -> Layout:
        """What stands in the footer."""
        with _told_in_one_line(self.path, "parquet"), _parquet(self.path) as file:
            facts = file.metadata
            rows = tuple(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
            return Layout(_types(file.schema_arrow), rows)

    def column(self, name: str) -> Iterator[Any]:
        """One column, row group by row group."""
        with _parquet(self.path) as file:
            for block in range(file.metadata.num_row_groups):
                yield file.read_row_group(block, columns=[name], use_threads=False).column(name)

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """Those columns of a row group."""
        with _parquet(self.path) as file:
            return file.read_row_group(block, columns=[*columns], use_threads=False)


@dataclass(frozen=True)
class ArrowShard:
    """An Arrow file as `datasets` saves it: a block is a record batch.

    Such a file has no index of what lies in it. Mapped into memory, only what is looked at is read; from afar, all of
    it would be.
    """

    path: str

    def layout(self) -> Layout:
        """What stands before the rows."""
        with _told_in_one_line(self.path, "arrow"):
            batches = list(_batches(self.path))
            return Layout(_types(batches[0].schema) if batches else {}, tuple(batch.num_rows for batch in batches))

    def column(self, name: str) -> Iterator[Any]:
        """One column, record batch by record batch."""
        return (batch.column(name) for batch in _batches(self.path))

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """Those columns of a record batch, copied: what stays mapped would end the process if the file were cut."""
        return _copied(next(islice(_batches(self.path), block, None)).select([*columns]))


KINDS: Mapping[str, type[ParquetShard] | type[ArrowShard]] = {"parquet": ParquetShard, "arrow": ArrowShard}
"""By what `datasets` calls them."""


def file_system(path: str) -> Any:
    """The fsspec file system of a path or URL; what is no URL is a path of this machine, whatever characters it has."""
    import fsspec

    return fsspec.core.url_to_fs(path)[0] if "://" in path else fsspec.filesystem("file")


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """The file, of which each column of a row group is one read: no more is asked of the network than is needed."""
    import pyarrow.parquet

    with file_system(path).open(path, "rb", cache_type="none") as stream, pyarrow.parquet.ParquetFile(stream) as file:
        yield file


def _batches(path: str) -> Iterator[Any]:
    """The record batches of an Arrow file of either format."""
    import pyarrow

    with pyarrow.memory_map(path) as mapped:
        try:
            reader = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _copied(batch: Any) -> Any:
    import pyarrow

    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    return pyarrow.ipc.open_stream(stream.getvalue()).read_next_batch()


def _types(schema: Any) -> dict[str, Any]:
    return {field.name: field.type for field in schema}


@contextmanager
def _told_in_one_line(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # file systems of the network have errors of their own
        raise UserError(f"data.path: {path!r} cannot be read as {kind} ({reason(error)}); was it cut short?") from error


def reason(error: Exception) -> str:
    """What an error says, as one line."""
    if isinstance(error, FileNotFoundError):  # those of fsspec have only a name in them
        return os.strerror(errno.ENOENT)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
