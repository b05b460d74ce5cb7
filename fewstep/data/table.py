"""Hugging Face `datasets` with a column of pictures and one of captions."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.data.captioned import one_line, settle_missing
from fewstep.data.faults import vanished
from fewstep.data.pictures import read_image
from fewstep.errors import UserError, did_you_mean


class Table:
    """The captioned pictures of a table; blank captions count as missing.

    Args:
        path: a folder of `Dataset.save_to_disk`, one that `load_dataset` reads, or a hub name.
        config: the set's configuration, where it has several.
        split: the split, as `load_dataset` takes it.
        revision: branch or commit, of a set on the hub.
        image_key: the column of pictures.
        caption_key: the column of captions.
        strict: refuse pictures without a caption, in place of leaving them out.

    Raises:
        UserError: `datasets` is not installed or does not find the set, a column is missing or of another kind, or
            there is no captioned picture.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        image_key: str = "image",
        caption_key: str = "text",
        strict: bool = False,
    ) -> None:
        self._path, self._key = str(path), image_key
        table = _open(path, config, split, revision)
        _require_columns(table, image_key, caption_key)
        captions = [one_line(value) for value in table[caption_key]]
        missing = [f"row {row}" for row, text in enumerate(captions) if not text]
        settle_missing(self._path, missing, len(captions), strict)
        self._rows = tuple(row for row, text in enumerate(captions) if text)
        self.captions = tuple(text for text in captions if text)
        self._table = _undecoded(table, image_key)

    def name(self, number: int) -> str:
        """The set's name and the row."""
        return f"{self._path} row {self._rows[number]}"

    def picture(self, number: int) -> Image.Image:
        """The row's picture."""
        try:
            value = self._table[self._rows[number]][self._key]
        except OSError as error:
            raise vanished(self.name(number), error) from error
        return stored_picture(value, self.name(number))


def stored_picture(value: Any, name: str) -> Image.Image:
    """The picture of a table's cell, which messages call `name`.

    Args:
        value: None, the bytes of a file, or `{"bytes": ..., "path": ...}` with one of them.
        name: of the row.

    Raises:
        DataFault: a file that the cell names cannot be read any more.
        UserError: there is no picture, or it is damaged.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is not None:
        return read_image(io.BytesIO(content), name)
    if value is None or value.get("path") is None:
        raise UserError(f"data.path: {name!r} has no picture")
    return read_image(Path(value["path"]), value["path"])


def _open(path: Path, config: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.name: huggingface needs datasets; install fewstep[data]") from error
    with told_in_one_line(path):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path), config, split=split, revision=revision)
    if isinstance(found, datasets.DatasetDict):
        splits = [str(name) for name in found]
        if split not in splits:
            near = did_you_mean(split, splits)
            raise UserError(f"data.options.split: {str(path)!r} has {', '.join(splits)}; found {split!r}{near}")
        found = found[split]
    return found


@contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """What `datasets` raises for sets that are not there, are no sets, or cannot be fetched."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"data.path: datasets cannot open {str(path)!r} ({reason})") from error


def _require_columns(table: Any, image_key: str, caption_key: str) -> None:
    import datasets

    for option, key in (("image_key", image_key), ("caption_key", caption_key)):
        if key not in table.features:
            columns = ", ".join(table.features)
            raise UserError(f"data.options.{option}: no column {key!r}{did_you_mean(key, table.features)}; "
                            f"there are {columns}")  # fmt: skip
    if not isinstance(table.features[image_key], datasets.Image):
        kind = type(table.features[image_key]).__name__
        raise UserError(f"data.options.image_key: column {image_key!r} is a {kind}, one of pictures is needed")


def _undecoded(table: Any, image_key: str) -> Any:
    """The table with the pictures as they are stored: they are decoded as those of every other set."""
    import datasets

    return table.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))
