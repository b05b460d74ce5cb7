"""What every data set offers, so that the loader and the metrics can treat them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewstep.models.conditioning import Condition


class SampleBatch(Protocol):
    """A batch of clean samples with whatever is known about them."""

    @property
    def images(self) -> Tensor:
        """`(B, C, H, W)` float32 in [-1, 1]; vectors `(B, D)` from a set of vectors."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """`(B,)` int64 class numbers, or None."""
        ...

    @property
    def captions(self) -> tuple[str, ...] | None:
        """One sentence an image, or None."""
        ...

    @property
    def condition(self) -> Condition | None:
        """What the network is told, ready made, in place of the labels; or None."""
        ...


class Dataset(Protocol):
    """A data set: a pure function from an index to a sample.

    `batch([3, 5])` must give the same two samples whatever else is asked for, before or beside them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of every image; the dimension of vectors."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every class by number; empty where samples carry no labels."""
        ...

    @property
    def length(self) -> int | None:
        """Number of samples; None for an endless set, which answers every index from 0."""
        ...

    def batch(self, indices: Sequence[int]) -> SampleBatch:
        """The samples at `indices`, in that order."""
        ...


class ImageSet(Dataset, Protocol):
    """A data set of images of one size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        ...


@dataclass(frozen=True)
class Samples:
    """The plain `SampleBatch`.

    Attributes:
        images: `(B, C, H, W)` float32 in [-1, 1], or vectors `(B, D)`.
        labels: `(B,)` int64, or None.
        captions: one sentence an image, or None.
        condition: what the network is told, ready made, in place of the labels; or None.
    """

    images: Tensor
    labels: Tensor | None = None
    captions: tuple[str, ...] | None = None
    condition: Condition | None = None


@dataclass(frozen=True)
class Unlabelled:
    """A data set without its labels, for an unconditional network."""

    dataset: Dataset
    classes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The set's."""
        return self.dataset.shape

    @property
    def length(self) -> int | None:
        """The set's."""
        return self.dataset.length

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`, their images alone."""
        return Samples(self.dataset.batch(indices).images)
