"""Image folders: class sub-folders, or captions in `metadata.jsonl` as on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.data.listing import Listing, list_folder
from fewstep.data.pictures import Fit, read_image
from fewstep.data.samples import Samples
from fewstep.errors import UserError


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
        self._fit = Fit(size, flip, allow_upscale)
        self._listing: Listing = list_folder(Path(path))
        if expected_classes is not None and len(self.classes) != expected_classes:
            raise UserError(
                f"data.path: {str(path)!r} has {len(self.classes)} class sub-folders, {expected_classes} are expected"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self._fit.size, self._fit.size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Sub-folder names by label; empty for a folder with captions."""
        return self._listing.classes

    @property
    def length(self) -> int:
        """Number of samples, mirrored ones included."""
        return self._fit.length(len(self._listing.entries))

    def __len__(self) -> int:
        return self.length

    def contents(self) -> list[tuple[str, int, str]]:
        """Name, label and caption of every file."""
        return [(entry.path.name, entry.label, entry.caption) for entry in self._listing.entries]

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`; from the number of files on, they are the mirrored ones.

        Raises:
            DataFault: a file has vanished.
            UserError: an image cannot be read, or is too small; the line names the file.
            IndexError: an index below 0 or past the last sample.
        """
        entries, images = [], []
        for index in indices:
            number, mirrored = self._fit.place(int(index), len(self._listing.entries))
            entry = self._listing.entries[number]
            images.append(self._fit.sample(read_image(entry.path, str(entry.path)), str(entry.path), mirrored))
            entries.append(entry)
        if self.classes:
            return Samples(torch.stack(images), labels=torch.tensor([entry.label for entry in entries]))
        return Samples(torch.stack(images), captions=tuple(entry.caption for entry in entries))

    def captions_at(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """The captions of the samples at `indices`, without their pictures; None where samples have classes."""
        if self.classes:
            return None
        entries = self._listing.entries
        return tuple(entries[self._fit.place(int(index), len(entries))[0]].caption for index in indices)
