"""What generated images are asked for: classes, prompts, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.commands.source import Source
from fewstep.data.captioned import Captioned
from fewstep.data.folder import ImageFolder
from fewstep.data.prompts import read_prompts
from fewstep.data.samples import Dataset
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition


@dataclass(frozen=True)
class Wanted:
    """Of N images.

    Attributes:
        labels: `(N,)` classes; None: none.
        prompts: one an image; None: none.
    """

    labels: Tensor | None = None
    prompts: tuple[str, ...] | None = None

    def at(self, rows: range) -> Wanted:
        """Of the images at those positions."""
        part = slice(rows.start, rows.stop)
        return Wanted(
            None if self.labels is None else self.labels[part], None if self.prompts is None else self.prompts[part]
        )

    def told(self, source: Source) -> Condition:
        """What the source's network is told of it."""
        if self.prompts is not None:
            return source.of_prompts(self.prompts)
        return Condition.none() if self.labels is None else Condition.of_labels(self.labels)


def wanted(source: Source, count: int, prompts: Sequence[str] | None = None) -> Wanted:
    """Of `count` images: the prompts one after the other, and again, or the source's classes; or nothing."""
    if prompts is not None:
        return Wanted(prompts=tuple(prompts[i % len(prompts)] for i in range(count)))
    return Wanted(torch.arange(count) % source.class_count if source.class_count else None)


def prompts_of(source: Source, file: Path | None, real: Dataset, indices: Sequence[int]) -> tuple[str, ...] | None:
    """The prompts that a source's images are asked for: of a file, or the captions of the real images.

    Args:
        source: whose images.
        file: with one prompt a line; None: captions are wanted.
        real: the real images.
        indices: which of them stand on the other side.

    Returns:
        One or more; None for a source that takes none.

    Raises:
        UserError: the source takes none and a file is given, it cannot be read, or there are neither prompts nor
            captions.
    """
    if not source.takes_prompts:
        if file is not None:
            takes = "classes" if source.class_count else "none"
            raise UserError(f"--prompts: {file} given, but the source takes {takes}; leave it out")
        return None
    if file is not None:
        return listed_prompts(file)
    found = captions_at(real, indices)
    if found is None:
        raise UserError("--prompts: missing; the source draws what prompts say, and the reference has no captions; "
                        "give a file with one prompt a line, or a reference as captions:FOLDER")  # fmt: skip
    return found


def listed_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line.

    Raises:
        UserError: it is missing, no text, or empty.
    """
    try:
        return read_prompts(file)
    except UserError as error:
        raise UserError(f"--prompts: {str(error).removeprefix('data.path: ')}") from error


def captions_at(dataset: Dataset, indices: Sequence[int]) -> tuple[str, ...] | None:
    """The captions of the samples at `indices`, without their pictures where that can be; None where it has none.

    Raises:
        DataFault: a caption cannot be read any more.
    """
    if isinstance(dataset, Captioned | ImageFolder):
        return dataset.captions_at(indices)
    if dataset.batch(indices[:1]).captions is None:
        return None
    return tuple(caption for index in indices for caption in dataset.batch([index]).captions or ())


def sha256_of(prompts: Sequence[str] | None) -> str | None:
    """Hash of prompts in their order; None of none."""
    return None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest()
