"""Image folders: class sub-folders, or captions in `metadata.jsonl` as on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.data.listing import Entry, Listing, list_folder
from fewstep.data.samples import Samples
from fewstep.errors import UserError

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageFolder:
    """The images of a folder, cut square.

    Either every image lies in a sub-folder named after its class (labels follow the sorted names), or a file
    `metadata.jsonl` names every image and its caption, one `{"file_name": ..., "text": ...}` a line.

    The shorter side is resized to `size` with antialiased bicubic, then the middle is cut out. Transparent images are
    laid over white, and turned upright as their camera noted.

    Args:
        path: the folder.
        size: height and width of the samples.
        flip: every image appears a second time, mirrored, so the set is twice as long.
        allow_upscale: accept images whose shorter side is below `size`.
        expected_classes: how many class sub-folders there must be; None for any number.

    Raises:
        UserError: the folder is missing, empty or laid out in neither way, or has another number of classes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        size: int,
        flip: bool = False,
        allow_upscale: bool = False,
        expected_classes: int | None = None,
    ) -> None:
        if size < 1:
            raise UserError(f"data.size: found {size}, allowed are whole numbers from 1 on")
        self._listing: Listing = list_folder(Path(path))
        self._size, self._flip, self._allow_upscale = size, flip, allow_upscale
        if expected_classes is not None and len(self.classes) != expected_classes:
            raise UserError(
                f"data.path: {str(path)!r} has {len(self.classes)} class sub-folders, {expected_classes} are expected"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self._size, self._size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Sub-folder names by label; empty for a folder with captions."""
        return self._listing.classes

    @property
    def length(self) -> int:
        """Number of samples, mirrored ones included."""
        return len(self._listing.entries) * (2 if self._flip else 1)

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`; from the number of files on, they are the mirrored ones.

        Raises:
            UserError: an image cannot be read, or is too small; the line names the file.
            IndexError: an index below 0 or past the last sample.
        """
        places = [self._place(int(index)) for index in indices]
        images = torch.stack([self._image(entry, mirrored) for entry, mirrored in places])
        if self.classes:
            return Samples(images, labels=torch.tensor([entry.label for entry, _ in places]))
        return Samples(images, captions=tuple(entry.caption for entry, _ in places))

    def _place(self, index: int) -> tuple[Entry, bool]:
        if not 0 <= index < self.length:
            raise IndexError(f"image folder: index {index} outside 0 to {self.length - 1}")
        mirrored, number = divmod(index, len(self._listing.entries))
        return self._listing.entries[number], bool(mirrored)

    def _image(self, entry: Entry, mirrored: bool) -> Tensor:
        """`(3, size, size)` in [-1, 1]."""
        image = read_image(entry.path)
        if min(image.size) < self._size and not self._allow_upscale:
            raise UserError(
                f"data.path: {str(entry.path)!r} is {image.width} x {image.height}, smaller than size {self._size}; "
                "set allow_upscale to enlarge such images"
            )
        square = cut_square(image, self._size)
        pixels = np.asarray(ImageOps.mirror(square) if mirrored else square, dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


def read_image(path: Path) -> Image.Image:
    """An upright RGB image.

    Raises:
        UserError: the file is damaged, no image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.path: {str(path)!r} cannot be read as an image ({reason})") from error
    if upright.mode.startswith(("I", "F")):
        raise UserError(f"data.path: {str(path)!r} has more than 8 bits a channel; convert it to 8 bits")
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
