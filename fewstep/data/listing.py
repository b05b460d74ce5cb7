"""What an image folder holds, found out once, when it is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, did_you_mean

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Entry:
    """One image file with its class number or its caption; the other one is -1 or empty."""

    path: Path
    label: int = -1
    caption: str = ""


@dataclass(frozen=True)
class Listing:
    """All images in a fixed order, and the class names (none where the images have captions)."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]


def list_folder(folder: Path) -> Listing:
    """The images of a folder with `metadata.jsonl`, or with one sub-folder a class.

    Raises:
        UserError: the folder is missing, holds no image, or is laid out in neither way.
    """
    require_folder(folder)
    files = images_below(folder)
    if (folder / METADATA).is_file():
        return _captioned(folder, files)
    if not files:
        raise UserError(f"data.path: {str(folder)!r} holds no image; {', '.join(SUFFIXES)} are read")
    return _classed(folder, files)


def require_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UserError: it is a file, or nothing; the line names the nearest folder beside it.
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"data.path: {str(folder)!r} is a file, a folder is needed")
    parent = folder.parent
    near = did_you_mean(folder.name, [p.name for p in parent.iterdir() if p.is_dir()]) if parent.is_dir() else ""
    raise UserError(f"data.path: no folder {str(folder)!r}{near}")


def images_below(folder: Path) -> list[Path]:
    """Image files at any depth, hidden files and folders left out, in an order that no file system decides."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    shown = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return sorted(shown, key=lambda p: p.relative_to(folder).parts)


def _classed(folder: Path, files: list[Path]) -> Listing:
    loose = [p for p in files if p.parent == folder]
    if loose:
        raise UserError(
            f"data.path: {str(folder)!r} has neither {METADATA} nor every image in a class sub-folder "
            f"({len(loose)} lie beside them, such as {loose[0].name!r})"
        )
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    labels = [classes.index(p.relative_to(folder).parts[0]) for p in files]
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        raise UserError(f"data.path: class sub-folder {str(folder / classes[empty[0]])!r} holds no image")
    return Listing(tuple(Entry(p, label=label) for p, label in zip(files, labels, strict=True)), classes)


def _captioned(folder: Path, files: list[Path]) -> Listing:
    rows = metadata_rows(folder)
    if not rows:
        raise UserError(f"data.path: {str(folder / METADATA)!r} is empty")
    named = {entry.path for entry in rows}
    missing = [p for p in files if p not in named]
    if missing:
        raise UserError(
            f"data.path: {str(folder / METADATA)!r} has no caption for {len(missing)} of {len(files)} images, "
            f"such as {missing[0].relative_to(folder).as_posix()!r}"
        )
    return Listing(rows, ())


def metadata_rows(folder: Path, key: str = "text", optional: bool = False) -> tuple[Entry, ...]:
    """The lines of a folder's `metadata.jsonl`.

    Args:
        folder: that the file lies in.
        key: of the caption in a line.
        optional: whether a line may lack the caption; it is empty then.

    Raises:
        UserError: the file is no text, or a line is no JSON, lacks a key, or names no file in the folder.
    """
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {str(path)!r} is no text in UTF-8 (byte {error.start})") from error
    return tuple(_row(folder, number, line, key, optional) for number, line in enumerate(lines, 1) if line.strip())


def _row(folder: Path, number: int, line: str, key: str, optional: bool) -> Entry:
    place = f"data.path: {str(folder / METADATA)!r} line {number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: no JSON ({error})") from error
    if optional and isinstance(row, dict) and row.get(key) is None:
        row = {**row, key: ""}
    for needed in ("file_name", key):
        if not isinstance(row, dict) or not isinstance(row.get(needed), str):
            raise UserError(f"{place}: needs {needed!r}, a string")
    relative = Path(row["file_name"])
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{place}: {row['file_name']!r} leads out of the folder")
    if not (folder / relative).is_file():
        raise UserError(f"{place}: no file {row['file_name']!r}")
    return Entry(folder / relative, caption=row[key])
