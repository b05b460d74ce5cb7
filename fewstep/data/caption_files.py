"""Folders of pictures with their captions in `metadata.jsonl`, or in a text file beside each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fewstep.data.captioned import one_line, settle_missing
from fewstep.data.listing import METADATA, SUFFIXES, images_below, metadata_rows, require_folder
from fewstep.data.pictures import read_image
from fewstep.errors import UserError


class CaptionFiles:
    """The pictures of a folder, at any depth, that have a caption.

    A caption stands in the `metadata.jsonl` of the picture's folder or of one above, in a line
    `{"file_name": ..., "text": ...}` with the name as seen from there; or it is the text of a file of the picture's
    name that ends in `.txt`. Blank ones count as missing.

    Args:
        path: the folder.
        caption_key: the caption's key in `metadata.jsonl`.
        strict: refuse pictures without a caption, in place of leaving them out.

    Raises:
        UserError: no folder, no captioned picture, a line of `metadata.jsonl` that is none, or that names no file.
    """

    def __init__(self, path: Path, *, caption_key: str = "text", strict: bool = False) -> None:
        require_folder(path)
        files = images_below(path)
        found = dict(_from_metadata(path, caption_key))
        for strange in found.keys() - set(files):
            raise UserError(f"data.path: {METADATA} names {str(strange)!r}, which is none of {', '.join(SUFFIXES)}")
        captions = [found.get(file) or _beside(file) for file in files]
        missing = [f.relative_to(path).as_posix() for f, text in zip(files, captions, strict=True) if not text]
        settle_missing(str(path), missing, len(files), strict)
        self._files = tuple(file for file, text in zip(files, captions, strict=True) if text)
        self.captions = tuple(text for text in captions if text)

    def name(self, number: int) -> str:
        """The file's path."""
        return str(self._files[number])

    def picture(self, number: int) -> Image.Image:
        """The file's picture."""
        return read_image(self._files[number], str(self._files[number]))


def _from_metadata(folder: Path, key: str) -> Iterator[tuple[Path, str]]:
    """Pictures with the captions that a `metadata.jsonl` somewhere in the folder gives them."""
    for place in sorted(folder.rglob(METADATA)):
        if not any(part.startswith(".") for part in place.relative_to(folder).parts):
            for row in metadata_rows(place.parent, key, optional=True):
                yield row.path, one_line(row.caption)


def _beside(picture: Path) -> str:
    """The text of the `.txt` beside a picture; empty where there is none."""
    path = picture.with_suffix(".txt")
    try:
        return one_line(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {str(path)!r} is no text in UTF-8 (byte {error.start})") from error
