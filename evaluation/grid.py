"""Pictures of many samples: one labelled row a model, the same noise in one column."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import UserError

from .features import as_rgb, to_uint8

_PAPER, _FRAME, _FAINT, _INK = (255, 255, 255), (222, 226, 230), (101, 109, 118), (36, 41, 47)
_FONT, _SMALL = 17, 14  # font sizes in pixels: the first line of a title, and the others
_MARGIN, _GAP, _LEADING = 14, 5, 4


@dataclass(frozen=True)
class _Layout:
    """Where things lie, in pixels: the first image's corner, an image's sides and the distance to the next one."""

    left: int
    top: int
    width: int
    height: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.width + _GAP), self.top + row * (self.height + _GAP)


def save_grid(
    path: Path,
    rows: Sequence[Tensor],
    row_titles: Sequence[str],
    column_titles: Sequence[str] = (),
    scale: int = 3,
    ragged: bool = False,
) -> None:
    """Writes a PNG with one row of images for each tensor; the file appears whole or not at all.

    Args:
        path: where to, ending in `.png`.
        rows: `(N, C, H, W)` floats in [-1, 1] or uint8, the same N, H and W in each.
        row_titles: one a row, written left of it; lines after the first are small and grey.
        column_titles: one a column, written above; or none.
        scale: whole number of screen pixels a pixel; nothing is smoothed, what is shown is what was made.
        ragged: whether rows may hold different numbers of images.

    Raises:
        UserError: counts or sizes that do not fit together, another ending, or a scale below 1.
    """
    _check(path, rows, row_titles, column_titles, scale, ragged)
    pixels = [as_rgb(to_uint8(row)).permute(0, 2, 3, 1).cpu().numpy() for row in rows]
    count, (height, width) = max(map(len, pixels)), pixels[0].shape[1:3]
    left = _MARGIN + max(_size(title)[0] for title in row_titles) + (_MARGIN if any(row_titles) else 0)
    top = _MARGIN + (max(_size(title)[1] for title in column_titles) + _GAP if column_titles else 0)
    layout = _Layout(left, top, width * scale, height * scale)
    right, bottom = layout.corner(len(rows), count)
    picture = Image.new("RGB", (right - _GAP + _MARGIN, bottom - _GAP + _MARGIN), _PAPER)
    for r, row in enumerate(pixels):
        for c, array in enumerate(row):
            _place(picture, Image.fromarray(array), layout, layout.corner(r, c))
    _write_titles(ImageDraw.Draw(picture), layout, row_titles, column_titles)
    _save(picture, path)


def _place(picture: Image.Image, tile: Image.Image, layout: _Layout, corner: tuple[int, int]) -> None:
    """Puts one image down, with a thin frame around it: without, a white background would run into the paper."""
    x, y = corner
    outer = (x - 1, y - 1, x + layout.width, y + layout.height)
    ImageDraw.Draw(picture).rectangle(outer, outline=_FRAME)
    picture.paste(tile.resize((layout.width, layout.height), Image.Resampling.NEAREST), corner)


def _write_titles(draw: ImageDraw.ImageDraw, layout: _Layout, rows: Sequence[str], columns: Sequence[str]) -> None:
    for r, title in enumerate(rows):
        middle = layout.corner(r, 0)[1] + layout.height // 2
        _write(draw, title, layout.left - _MARGIN, middle - _size(title)[1] // 2, "ra")
    for c, title in enumerate(columns):
        middle = layout.corner(0, c)[0] + layout.width // 2
        _write(draw, title, middle, layout.top - _GAP - _size(title)[1], "ma")


def _write(draw: ImageDraw.ImageDraw, title: str, x: int, y: int, anchor: str) -> None:
    """Writes lines downwards from `y`; `x` is their right end ("ra") or their middle ("ma")."""
    for number, line in enumerate(title.splitlines()):
        size = _SMALL if number else _FONT
        draw.text((x, y), line, _FAINT if number else _INK, font=ImageFont.load_default(size), anchor=anchor)
        y += size + _LEADING


def _size(title: str) -> tuple[int, int]:
    """Width and height of a title in pixels."""
    sizes = [_SMALL if number else _FONT for number, _ in enumerate(title.splitlines())]
    lines = zip(title.splitlines(), sizes, strict=True)
    width = max((round(ImageFont.load_default(size).getlength(line)) for line, size in lines), default=0)
    return width, sum(size + _LEADING for size in sizes)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check(
    path: Path,
    rows: Sequence[Tensor],
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    scale: int,
    ragged: bool,
) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"grid {path}: found the ending {path.suffix!r}, allowed is '.png'")
    if scale < 1:
        raise UserError(f"grid scale: found {scale}, allowed are whole numbers from 1")
    if not rows or len(row_titles) != len(rows):
        raise UserError(f"grid: found {len(row_titles)} row titles for {len(rows)} rows, one each is needed")
    counts, sizes = {len(row) for row in rows}, {tuple(row.shape[-2:]) for row in rows}
    if (len(counts) > 1 and not ragged) or len(sizes) > 1 or 0 in counts:
        raise UserError(f"grid: found rows of {sorted(counts)} images of sizes {sorted(sizes)}, all rows must be alike")
    if column_titles and len(column_titles) != max(counts):
        raise UserError(f"grid: found {len(column_titles)} column titles for {max(counts)} columns")
