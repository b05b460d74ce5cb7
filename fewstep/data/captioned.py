"""Pictures with captions, wherever they lie: in a folder, in tar files, in a table."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from fewstep.data.pictures import Fit
from fewstep.data.samples import Samples
from fewstep.data.stream_order import StreamOrder
from fewstep.errors import UserError

_log = logging.getLogger("fewstep.data")


class Gallery(Protocol):
    """Captioned pictures by number."""

    @property
    def captions(self) -> Sequence[str]:
        """One sentence a picture."""
        ...

    def name(self, number: int) -> str:
        """What messages call a picture."""
        ...

    def picture(self, number: int) -> Image.Image:
        """An upright RGB picture of any size.

        Raises:
            DataFault: it cannot be read any more.
            UserError: it is damaged.
        """
        ...


class Captioned:
    """A data set of a gallery's pictures, cut square as an image folder's are.

    Args:
        gallery: the pictures.
        fit: how they become samples.
        order: in which a run reads them; None: any picture may follow any other.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, gallery: Gallery, fit: Fit, order: StreamOrder | None = None) -> None:
        self.gallery, self.fit, self.order = gallery, fit, order

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.fit.size, self.fit.size)

    @property
    def length(self) -> int:
        """Number of samples, mirrored ones included."""
        return self.fit.length(len(self.gallery.captions))

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`; from the number of pictures on, they are the mirrored ones.

        Raises:
            DataFault: a picture cannot be read any more.
            UserError: a picture is damaged, or too small; the line names it.
            IndexError: an index below 0 or past the last sample.
        """
        images, captions = [], []
        for index in indices:  # a picture and its caption at once: a stream may hold no more than their block
            number, mirrored = self.fit.place(int(index), len(self.gallery.captions))
            images.append(self.fit.sample(self.gallery.picture(number), self.gallery.name(number), mirrored))
            captions.append(self.gallery.captions[number])
        return Samples(torch.stack(images), captions=tuple(captions))

    def captions_at(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The captions of the samples at `indices`; no picture is read."""
        total = len(self.gallery.captions)
        return tuple(self.gallery.captions[self.fit.place(int(index), total)[0]] for index in indices)


def one_line(text: object) -> str:
    """A caption without line breaks and surrounding blanks; empty for what is no text."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def settle_missing(place: str, missing: Sequence[str], total: int, strict: bool) -> None:
    """Say once that pictures without a caption are left out, or refuse them.

    Args:
        place: the folder, file or table.
        missing: names of the pictures without a caption.
        total: number of all pictures.
        strict: whether to refuse.

    Raises:
        UserError: no picture at all, none with a caption, or one without where `strict`.
    """
    if not total:
        raise UserError(f"data.path: {place!r} holds no picture")
    if len(missing) == total:
        raise UserError(
            f"data.path: {place!r} has no caption for any of its {total} pictures; data.options.caption_key says where "
            "captions stand"
        )
    if not missing:
        return
    what = f"data.path: {place!r} has no caption for {len(missing)} of {total} pictures, such as {missing[0]!r}"
    if strict:
        raise UserError(f"{what}; write them, or leave such pictures out with data.options.strict=false")
    if os.environ.get("RANK", "0") == "0":  # one line for all processes of a run
        _log.warning("warning: %s; they are left out", what)
