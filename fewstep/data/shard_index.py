"""What a stream must know before its first sample: the rows of each block of each shard, and which lack a caption.

That takes the footer and the captions of every shard. Of files on the network, which cannot change under their address
(it has the commit), it is kept on the disk, so that only the first start on a machine asks for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.captioned import one_line
from fewstep.data.shard_list import ShardList, kept_folder
from fewstep.data.shards import Layout, Shard, reason
from fewstep.errors import UserError, did_you_mean

_READERS = 16  # shards looked at together; they wait for the network
_FORMAT = 1


@dataclass(frozen=True)
class Keys:
    """Names of the columns of pictures and of captions."""

    image: str
    caption: str


@dataclass(frozen=True)
class ShardFacts:
    """What one shard holds.

    Attributes:
        rows: in each block.
        blank: numbers of the rows without a caption, counted from the shard's first.
        digest: of the captions.
    """

    rows: tuple[int, ...]
    blank: tuple[int, ...]
    digest: str

    @property
    def firsts(self) -> tuple[int, ...]:
        """Number of the first row of each block."""
        return tuple(accumulate(self.rows, initial=0))[:-1]


def index_shards(shards: ShardList, keys: Keys) -> tuple[ShardFacts, ...]:
    """The facts of all shards, in their order.

    Raises:
        UserError: a shard is missing or damaged, or has no such columns.
    """
    if not shards.afar:
        return _look_at_all(shards, keys)
    path = _place(shards, keys)
    with _alone(path):  # of several processes that start together, one looks
        found = _read(path)
        if found is None:
            found = _look_at_all(shards, keys)
            _write(path, found)
    return found


def named(file: str, row: int) -> str:
    """What messages call a row, counted from the shard's first, which is 0."""
    return f"{file} row {row}"


def _look_at_all(shards: ShardList, keys: Keys) -> tuple[ShardFacts, ...]:
    with ThreadPoolExecutor(_READERS) as pool:
        return tuple(pool.map(lambda shard: _look(shard, keys), shards.shards))


def _look(shard: Shard, keys: Keys) -> ShardFacts:
    """Read the captions of a shard."""
    layout = shard.layout()
    _require_columns(layout, keys)
    first, blank, digest = 0, [], hashlib.sha256()
    for captions in _captions(shard, keys.caption):
        blank += [first + row for row, caption in enumerate(captions) if not caption]
        digest.update("\n".join(captions).encode() + b"\n\n")
        first += len(captions)
    return ShardFacts(layout.rows, tuple(blank), digest.hexdigest())


def _captions(shard: Shard, key: str) -> Iterator[list[str]]:
    """The captions of each block; empty where there is none."""
    first = 0
    try:
        for block in shard.column(key):
            yield [one_line(value) for value in block.to_pylist()]
            first += len(block)
    except Exception as error:  # file systems of the network have errors of their own
        raise UserError(f"data.path: {named(shard.path, first)!r} cannot be read ({reason(error)})") from error


def _require_columns(layout: Layout, keys: Keys) -> None:
    columns = layout.columns
    for option, key in (("image_key", keys.image), ("caption_key", keys.caption)):
        if layout.rows and key not in columns:
            raise UserError(f"data.options.{option}: no column {key!r}{did_you_mean(key, columns)}; "
                            f"there are {', '.join(columns)}")  # fmt: skip
    if layout.rows and not _holds_pictures(columns[keys.image]):
        raise UserError(f"data.options.image_key: column {keys.image!r} is a {columns[keys.image]}, one of pictures is "
                        "needed")  # fmt: skip


def _holds_pictures(kind: Any) -> bool:
    """Whether a column is of bytes, or has a field of them, as `datasets` stores pictures."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _place(shards: ShardList, keys: Keys) -> Path:
    asked = json.dumps([_FORMAT, shards.kind, shards.files, asdict(keys)])
    return kept_folder() / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield
    except OSError as error:
        raise UserError(f"data.options.streaming: {str(path.parent)!r} cannot be written ({reason(error)}); give "
                        "another folder in the environment's HF_DATASETS_CACHE") from error  # fmt: skip


def _read(path: Path) -> tuple[ShardFacts, ...] | None:
    """The facts in a file; None where there is none, or no whole one."""
    try:
        return tuple(_facts(one) for one in json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _facts(values: dict[str, Any]) -> ShardFacts:
    return ShardFacts(tuple(values["rows"]), tuple(values["blank"]), values["digest"])


def _write(path: Path, facts: Sequence[ShardFacts]) -> None:
    partial = path.with_suffix(".partial")  # one name, under the lock: the next one takes the place of a killed one's
    partial.write_text(json.dumps([asdict(one) for one in facts]))
    partial.replace(path)


def kept_rows(facts: ShardFacts) -> list[np.ndarray | None]:
    """For each block, its rows with a caption, counted from the block's first; None where all have one."""
    blank = np.array(facts.blank, np.int64)
    ends = np.searchsorted(blank, [*facts.firsts, sum(facts.rows)])
    out: list[np.ndarray | None] = []
    for rows, first, begin, end in zip(facts.rows, facts.firsts, ends, ends[1:], strict=False):
        lacking = blank[begin:end] - first
        out.append(np.delete(np.arange(rows, dtype=np.int32), lacking) if len(lacking) else None)
    return out
