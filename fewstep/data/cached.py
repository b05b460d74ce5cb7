"""A data set of latents and prompt embeddings that were made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.cache_files import (
    CONDITION,
    LABELS,
    LATENTS,
    PROMPT,
    SHARED,
    FileFacts,
    read_index,
    sha256,
)
from fewstep.data.caching import padded, unpacked
from fewstep.data.prompts import no_pixels
from fewstep.data.row_file import RowFile
from fewstep.data.samples import Samples
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition


class CachedLatents:
    """The samples of a cache: latents with the conditions of their prompts, or with class labels.

    Embeddings are handed out in float32, whatever they are stored in, and prompts of different lengths with zeros
    behind, as long as the longest one of the cache, so that a sample is the same in every batch.

    Args:
        folder: of the cache.
        check: whether to compare the checksum of every file; their sizes are always compared.

    Attributes:
        folder: of the cache.
        index: what the cache says of itself.
        null: the null condition, of one sample; None for a cache of class labels.

    Raises:
        UserError: the cache is missing, unfinished, or has a missing or damaged file.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self.folder, self.index = folder, read_index(folder)
        self._files = tuple(self._opened(folder, facts, check, self._needed()) for facts in self.index.shards)
        self._starts = np.array([0, *accumulate(facts.samples for facts in self.index.shards)])
        if self.length != self.index.plan.samples:
            raise UserError(f"data.path: {folder} has {self.length} samples, {self.index.plan.samples} are stated; "
                            f"make it anew: {self.index.plan.command(folder)}")  # fmt: skip
        self._shared = unpacked(self.index.shared)
        null = None if self.index.null is None else self._opened(folder, self.index.null, check, ())
        self._keys = () if null is None else tuple(k for k in null.places if k.startswith(CONDITION))
        if null is not None:
            tensors = {k.removeprefix(SHARED): null.whole(k) for k in null.places if k.startswith(SHARED)}
            self._shared |= tensors
        self.null = None if null is None else self._condition(lambda key: null.rows(key, [0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents."""
        return self.index.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty for a cache of prompts."""
        return self.index.plan.classes

    @property
    def length(self) -> int:
        """Number of samples."""
        return int(self._starts[-1])

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`; latents are NaN in a cache of prompts alone.

        Raises:
            DataFault: a file cannot be read any more.
            IndexError: an index below 0 or past the last sample.
        """
        places = [self._place(int(index)) for index in indices]
        latents = no_pixels(len(places), self.shape)
        if self.index.plan.pixels:
            latents = torch.cat([file.rows(LATENTS, [row]) for file, row in places]).float()
        if self.null is None:
            labels = torch.cat([file.rows(LABELS, [row]) for file, row in places]) if self.classes else None
            return Samples(latents, labels)
        prompts = [(file, int(file.rows(PROMPT, [row]))) for file, row in places]
        condition = self._condition(lambda key: torch.cat([self._row(file, key, row) for file, row in prompts]))
        return Samples(latents, condition=condition)

    def _place(self, index: int) -> tuple[RowFile, int]:
        if not 0 <= index < self.length:
            raise IndexError(f"cache: index {index} outside 0 to {self.length - 1}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[shard], index - int(self._starts[shard])

    def _row(self, file: RowFile, key: str, row: int) -> Tensor:
        return self._long(key, file.rows(key, [row]))

    def _long(self, key: str, rows: Tensor) -> Tensor:
        length = self.index.lengths.get(key)
        return rows if length is None else padded(rows, length)

    def _condition(self, read: Callable[[str], Tensor]) -> Condition:
        tensors = {key.removeprefix(CONDITION): self._long(key, read(key)) for key in self._keys}
        return Condition({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, self._shared)

    def _needed(self) -> tuple[str, ...]:
        """What every shard holds."""
        told = PROMPT if self.index.null is not None else LABELS if self.classes else None
        return tuple(name for name in (LATENTS if self.index.plan.pixels else None, told) if name is not None)

    def _opened(self, folder: Path, facts: FileFacts, check: bool, needed: Sequence[str]) -> RowFile:
        path, mend = folder / facts.file, f"make it anew: {self.index.plan.command(folder)}"
        try:
            size = path.stat().st_size
            if size != facts.bytes:
                raise UserError(f"data.path: {path} is damaged ({size} bytes, {facts.bytes} are stated); {mend}")
            if check and sha256(path) != facts.sha256:
                raise UserError(f"data.path: {path} is damaged (its checksum is another); {mend}")
            file = RowFile.open(path)
            for name in needed:
                if name not in file.places:
                    raise UserError(f"data.path: {path} is damaged (no {name}); {mend}")
            return file
        except FileNotFoundError as error:
            raise UserError(f"data.path: {path} is missing; {mend}") from error
        except OSError as error:
            raise UserError(f"data.path: {path} cannot be read ({error.strerror})") from error
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"data.path: {path} is damaged ({error}); {mend}") from error
