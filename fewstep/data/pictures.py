"""From a picture's file to a square tensor, the same way for every set of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.data.faults import vanished
from fewstep.errors import UserError

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Fit:
    """How pictures become samples.

    Attributes:
        size: height and width.
        flip: every picture appears a second time, mirrored, so the set is twice as long.
        allow_upscale: accept pictures whose shorter side is below `size`.

    Raises:
        UserError: a size below 1.
    """

    size: int
    flip: bool = False
    allow_upscale: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"data.size: found {self.size}, allowed are whole numbers from 1 on")

    def length(self, pictures: int) -> int:
        """Samples of so many pictures."""
        return pictures * (2 if self.flip else 1)

    def place(self, index: int, pictures: int) -> tuple[int, bool]:
        """The picture of a sample, and whether it is mirrored: from the number of pictures on, all are.

        Raises:
            IndexError: an index below 0 or past the last sample.
        """
        if not 0 <= index < self.length(pictures):
            raise IndexError(f"image folder: index {index} outside 0 to {self.length(pictures) - 1}")
        mirrored, number = divmod(index, pictures)
        return number, bool(mirrored)

    def sample(self, image: Image.Image, place: str, mirrored: bool) -> Tensor:
        """`(3, size, size)` in [-1, 1] of the picture that messages call `place`.

        Raises:
            UserError: it is too small.
        """
        if min(image.size) < self.size and not self.allow_upscale:
            raise UserError(
                f"data.path: {place!r} is {image.width} x {image.height}, smaller than size {self.size}; "
                "set allow_upscale to enlarge such images"
            )
        square = cut_square(image, self.size)
        pixels = np.asarray(ImageOps.mirror(square) if mirrored else square, dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


def read_image(source: Path | BinaryIO, place: str) -> Image.Image:
    """An upright RGB picture, of a file or of a stream that messages call `place`.

    Raises:
        DataFault: the system does not give the file.
        UserError: it is damaged, no image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise vanished(place, error) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.path: {place!r} cannot be read as an image ({reason})") from error
    if upright.mode.startswith(("I", "F")):
        raise UserError(f"data.path: {place!r} has more than 8 bits a channel; convert it to 8 bits")
    if "A" in upright.getbands() or "transparency" in upright.info:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def cut_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` with Pillow's bicubic (it widens its window when shrinking), then the middle."""
    factor = size / min(image.size)
    width, height = max(size, round(image.width * factor)), max(size, round(image.height * factor))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))
