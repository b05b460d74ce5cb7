"""Blocks that were fetched over the network, kept for the other processes of this machine that need them too.

Processes and loader workers take a run's batches by turns, so that nearly each of them needs nearly every block. On one
machine it is fetched once: the first to need it writes it to the disk, where the others find it, and those that were
read longest ago are deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.shards import Layout, Shard

_LOCKS = 64  # files that stand for all blocks, so that their number does not grow


@dataclass(frozen=True)
class KeptShard:
    """A shard on the network with its blocks on the disk.

    Attributes:
        shard: it stands for.
        folder: where blocks are kept, those of all shards.
        room: bytes that all of them may take.
    """

    shard: Shard
    folder: Path
    room: int

    @property
    def path(self) -> str:
        """The shard's."""
        return self.shard.path

    def layout(self) -> Layout:
        """The shard's."""
        return self.shard.layout()

    def column(self, name: str) -> Iterator[Any]:
        """The shard's."""
        return self.shard.column(name)

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """Those columns of a block, from the disk where they are there.

        Raises:
            Exception: whatever Arrow, the file system or the network raise.
        """
        from filelock import FileLock

        digest = hashlib.sha256(json.dumps([self.path, block, *columns]).encode()).hexdigest()
        path, lock = self.folder / f"{digest}.arrow", f"lock-{int(digest[:8], 16) % _LOCKS:02d}"
        found = _read(path)
        if found is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / lock):  # whoever waits here finds what the other has fetched
            found = _read(path)
            if found is None:
                found = self.shard.read(block, columns)
                with suppress(OSError):  # a full disk is no reason to stop: the block is at hand
                    _write(path, found)
                    _make_room(self.folder, self.room, path)
        return found


def _read(path: Path) -> Any:
    """The block in a file; None where there is none, or no whole one."""
    import pyarrow

    try:
        os.utime(path)
        return pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    except (OSError, pyarrow.ArrowInvalid):
        return None


def _write(path: Path, found: Any) -> None:
    import pyarrow

    partial = path.with_suffix(".partial")  # one name, under the lock: the next one takes the place of a killed one's
    try:
        with partial.open("wb") as stream:
            with pyarrow.ipc.new_stream(stream, found.schema) as writer:
                writer.write(found)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _make_room(folder: Path, room: int, latest: Path) -> None:
    """Delete the blocks that were read longest ago, but never the latest."""
    kept = sorted((facts.st_mtime_ns, facts.st_size, path) for path, facts in _files(folder) if path != latest)
    total = sum(size for _, size, _ in kept) + latest.stat().st_size
    for _, size, path in kept:
        if total <= room:
            return
        path.unlink(missing_ok=True)
        total -= size


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.arrow"):
        try:
            yield path, path.stat()
        except FileNotFoundError:  # another process has just made room
            continue
