"""Captioned pictures of a table that is too large to copy: any row of it, of which only a few blocks are ever held."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.data.captioned import one_line, settle_missing
from fewstep.data.faults import DataFault
from fewstep.data.shard_index import Keys, ShardFacts, index_shards, kept_rows, named
from fewstep.data.shard_keep import KeptShard
from fewstep.data.shard_list import ShardList, kept_folder
from fewstep.data.shards import Shard, reason
from fewstep.data.table import stored_picture


@dataclass(frozen=True)
class _Block:
    """The captioned rows of what is read at once.

    Attributes:
        shard: it lies in.
        number: of the block in its shard.
        rows: those without a caption included.
        first: number in the shard of the first of them.
        kept: rows with a caption, counted from there; None: all of them.
    """

    shard: Shard
    number: int
    rows: int
    first: int
    kept: NDArray[np.int32] | None

    @property
    def size(self) -> int:
        """Number of rows with a caption."""
        return self.rows if self.kept is None else len(self.kept)

    def row(self, place: int) -> int:
        """Number in the block of its `place`-th captioned row."""
        return place if self.kept is None else int(self.kept[place])


class Stream:
    """The captioned pictures of shards, by number, in the order of the shards' rows; blank captions count as missing.

    The library's own streams cannot go on from a number: their state is each process's own, and what their shuffle
    holds ready is not in it. Here a picture's number tells its block, by the counts that stand in the shards, and a
    block is read when one of its pictures is asked for. What is held is at most what a window of `buffer` pictures in
    the order of `StreamOrder` covers. All captions are read once, when the set is opened, and not kept: which rows
    lack one must be known before the first picture's number is.

    Args:
        shards: the files.
        image_key: the column of pictures.
        caption_key: the column of captions.
        strict: refuse pictures without a caption, in place of leaving them out.
        buffer: pictures that are read mixed with each other.
        keep: bytes that may stay on the disk of what comes over the network.

    Attributes:
        digest: of all captions and of where they stand.

    Raises:
        UserError: a shard is missing or damaged, a column is missing or of another kind, or there is no captioned
            picture.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        image_key: str = "image",
        caption_key: str = "text",
        strict: bool = False,
        buffer: int = 1,
        keep: int = 0,
    ) -> None:
        self._keys = Keys(image_key, caption_key)
        facts = index_shards(shards, self._keys)
        missing = [named(file, row) for file, one in zip(shards.files, facts, strict=True) for row in one.blank]
        settle_missing(shards.place, missing, sum(sum(one.rows) for one in facts), strict)
        whole = zip(_kept(shards, keep), facts, strict=True)
        self._blocks = tuple(block for shard, one in whole for block in _blocks(shard, one))
        self._firsts = np.array([0, *accumulate(self.sizes)])
        self._room = buffer + 2 * max(self.sizes)
        self._held: dict[int, Any] = {}
        self.digest = hashlib.sha256("".join(one.digest for one in facts).encode()).hexdigest()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Captioned pictures of each block."""
        return tuple(block.size for block in self._blocks)

    @property
    def captions(self) -> Sequence[str]:
        """One sentence a picture, read when it is asked for."""
        return _Captions(self)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def name(self, number: int) -> str:
        """The shard and the row in it, counted from 0."""
        index, place = self._place(number)
        block = self._blocks[index]
        return named(block.shard.path, block.first + block.row(place))

    def caption(self, number: int) -> str:
        """The picture's sentence.

        Raises:
            DataFault: its shard cannot be read any more.
        """
        return one_line(self._cell(number, self._keys.caption))

    def picture(self, number: int) -> Image.Image:
        """The row's picture.

        Raises:
            DataFault: its shard cannot be read any more.
            UserError: it is damaged.
        """
        return stored_picture(self._cell(number, self._keys.image), self.name(number))

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: not the blocks at hand."""
        return {**self.__dict__, "_held": {}}

    def _place(self, number: int) -> tuple[int, int]:
        """The block of a picture, and its place among that one's captioned rows."""
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return index, number - int(self._firsts[index])

    def _cell(self, number: int, key: str) -> Any:
        index, place = self._place(number)
        block = self._blocks[index]
        if index in self._held:
            self._held[index] = self._held.pop(index)  # the latest used is the last
        else:
            self._make_room(block.size)
            self._held[index] = self._read(number, block)
        return self._held[index].column(key)[place].as_py()

    def _make_room(self, pictures: int) -> None:
        while self._held and pictures + sum(self._blocks[index].size for index in self._held) > self._room:
            del self._held[next(iter(self._held))]

    def _read(self, number: int, block: _Block) -> Any:
        """The captioned rows of a block."""
        try:
            found = block.shard.read(block.number, [self._keys.image, self._keys.caption])
            if found.num_rows != block.rows:
                raise ValueError(f"{found.num_rows} rows in place of {block.rows}")
            return found if block.kept is None else found.filter(np.isin(np.arange(block.rows), block.kept))
        except Exception as error:  # file systems of the network have errors of their own
            why = reason(error)
            raise DataFault(f"data.path: {self.name(number)!r} cannot be read any more ({why}); put it back") from error


class _Captions(Sequence[str]):
    """The captions of a stream, none of which is kept."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, number: Any) -> Any:
        return self._stream.caption(number)


def _kept(shards: ShardList, keep: int) -> tuple[Shard, ...]:
    if not shards.afar or not keep:
        return shards.shards
    return tuple(KeptShard(shard, kept_folder() / "blocks", keep) for shard in shards.shards)


def _blocks(shard: Shard, facts: ShardFacts) -> list[_Block]:
    places = zip(facts.rows, facts.firsts, kept_rows(facts), strict=True)
    return [_Block(shard, number, *place) for number, place in enumerate(places)]
