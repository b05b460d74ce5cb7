"""The real images that generated ones are measured against, as a command or a config names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fewstep.commands.source import Source
from fewstep.data.samples import Dataset, ImageSet
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError, did_you_mean

KINDS = ("folder", "captions", "webdataset", "huggingface")
"""Sets that have a place, as in `captions:FOLDER`."""


class Named(Protocol):
    """What says which real images."""

    @property
    def reference(self) -> str:
        """A data set's name, a folder of images, or a kind of set and its place."""
        ...

    @property
    def seed(self) -> int:
        """Of an embedded set."""
        ...

    @property
    def reference_options(self) -> Mapping[str, Any]:
        """Further arguments of a set that has a place."""
        ...


def real_set(request: Named, source: Source) -> ImageSet:
    """The real set, in the size of the source's images.

    Raises:
        UserError: there is no such set, or it does not go with the source.
    """
    try:
        dataset = _opened(request, source.picture_shape[-1])
    except UserError as error:
        raise UserError(f"--reference: {error}") from error
    _check_fit(request.reference, dataset, source)
    return dataset  # pyright: ignore[reportReturnType] - its shape was checked


def _opened(request: Named, side: int) -> Dataset:
    name, _, place = request.reference.partition(":")
    if Path(request.reference).is_dir():
        return open_dataset("folder", seed=request.seed, size=side, path=request.reference)
    if not place:
        size = side if name == "emoji" else None
        return open_dataset(name, seed=request.seed, size=size, options=request.reference_options)
    if name not in KINDS:
        near = did_you_mean(name, KINDS)
        raise UserError(f"{request.reference!r} is no folder; with a place, {', '.join(KINDS)} are allowed{near}")
    return open_dataset(name, seed=request.seed, size=side, path=place, options=request.reference_options)


def require_shape(name: str, shape: tuple[int, ...], source: Source) -> None:
    """Does nothing where a source makes images of the reference's shape.

    Raises:
        UserError: it makes others.
    """
    if shape != source.picture_shape:
        raise UserError(f"--reference: {name} has images of shape {shape}, the source makes {source.picture_shape}")


def _check_fit(name: str, dataset: Dataset, source: Source) -> None:
    require_shape(name, dataset.shape, source)
    count = len(dataset.classes)
    if source.class_count and count and count != source.class_count:
        raise UserError(f"--reference: {name} has {count} classes, the source {source.class_count}; they must agree")
