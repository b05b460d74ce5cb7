"""The embedded sheet of 995 Noto emoji (images by Google, Apache-2.0; see the notice beside the sheet)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent / "assets" / "emoji"
TILE = 64

# A mirrored picture of these would not be what its name says.
_ONE_WAY = re.compile(r"\b(left|right|rightwards|quarter|waxing|waning|crescent|hundred|dvd)\b")

# Distinct in colour and outline, and recognisable when drawn 24 to 30 pixels wide.
EMOJI32_CLASSES: tuple[str, ...] = (
    "red apple",
    "banana",
    "strawberry",
    "watermelon slice",
    "pizza slice",
    "doughnut",
    "mushroom",
    "cat face",
    "panda face",
    "frog face",
    "pig face",
    "penguin",
    "octopus",
    "ladybug",
    "cactus",
    "sunflower",
    "soccer ball",
    "basketball",
    "red car",
    "rocket",
    "balloon",
    "gift box",
    "red heart",
    "yellow star",
)


@dataclass(frozen=True)
class Sprite:
    """One picture of the sheet: its name in captions, its category, its tile."""

    name: str
    category: str
    column: int
    row: int


@cache
def all_sprites() -> dict[str, Sprite]:
    """Every sprite by name, in the order of the sheet."""
    index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return {entry["name"]: Sprite(**entry) for entry in index["sprites"]}


@cache
def _sheet() -> Tensor:
    """The whole sheet `(4, H, W)` uint8, straight alpha."""
    with Image.open(FOLDER / "sheet.webp") as image:
        pixels = np.array(image.convert("RGBA"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def tile(sprite: Sprite) -> Tensor:
    """The picture of a sprite as shipped: `(4, 64, 64)` uint8, red, green, blue, straight alpha."""
    top, left = sprite.row * TILE, sprite.column * TILE
    return _sheet()[:, top : top + TILE, left : left + TILE]


@lru_cache(maxsize=4)
def premultiplied(names: tuple[str, ...]) -> Tensor:
    """The pictures of `names`: `(N, 4, 64, 64)` uint8 with colours times alpha, ready to be resampled and laid over.

    Shared between callers: not to be written to.
    """
    sprites = all_sprites()
    tiles = torch.stack([tile(sprites[name]) for name in names]).to(torch.int32)
    colours = (tiles[:, :3] * tiles[:, 3:] + 127) // 255
    return torch.cat([colours, tiles[:, 3:]], dim=1).to(torch.uint8)


def mirrorable(name: str) -> bool:
    """False where the name tells left from right, or the picture holds writing that it names."""
    return _ONE_WAY.search(name) is None


def curated_order() -> tuple[str, ...]:
    """All names, the hand-picked ones first."""
    return EMOJI32_CLASSES + tuple(name for name in all_sprites() if name not in EMOJI32_CLASSES)


def chosen_names(classes: Sequence[str] | int | None) -> tuple[str, ...]:
    """Sprite names for `classes`: given names, the first N of the curated order, or all of them for None.

    Raises:
        UserError: an unknown or doubled name, no name at all, or a number outside 1 to 995.
    """
    sprites = all_sprites()
    if classes is None:
        return tuple(sprites)
    if isinstance(classes, int):
        if not 1 <= classes <= len(sprites):
            raise UserError(f"emoji classes: found {classes}, allowed are 1 to {len(sprites)} or a list of names")
        return curated_order()[:classes]
    for name in classes:
        if name not in sprites:
            raise UserError(f"emoji classes: no sprite is named {name!r}{did_you_mean(name, sprites)}")
    if not classes or len(set(classes)) != len(classes):
        raise UserError(f"emoji classes: found {len(classes)} names, each must be given once and at least one")
    return tuple(classes)
