"""The ten named backgrounds of emoji scenes: flat colours, and gradients from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError, did_you_mean

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """Colour of the top and of the bottom row, 0 to 255; equal for a flat background."""

    top: Colour
    bottom: Colour


def _flat(colour: Colour) -> Background:
    return Background(colour, colour)


BACKGROUNDS: dict[str, Background] = {
    "white": _flat((255, 255, 255)),
    "navy": _flat((16, 24, 72)),
    "turquoise": _flat((64, 200, 196)),
    "lilac": _flat((196, 160, 240)),
    "black": _flat((0, 0, 0)),
    "grey": _flat((144, 144, 144)),
    "blue": _flat((56, 112, 224)),
    "green": _flat((72, 168, 88)),
    "sky": Background((88, 168, 248), (232, 244, 255)),
    "sunset": Background((88, 48, 136), (255, 168, 88)),
}


def chosen_backgrounds(wanted: Sequence[str] | int) -> tuple[str, ...]:
    """Names for `wanted`: given names, or the first N of the list above.

    Raises:
        UserError: an unknown or doubled name, none at all, or a number outside 1 to 10.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(BACKGROUNDS):
            raise UserError(
                f"emoji backgrounds: found {wanted}, allowed are 1 to {len(BACKGROUNDS)} or a list of names"
            )
        return tuple(BACKGROUNDS)[:wanted]
    for name in wanted:
        if name not in BACKGROUNDS:
            raise UserError(f"emoji backgrounds: none is named {name!r}{did_you_mean(name, BACKGROUNDS)}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"emoji backgrounds: found {len(wanted)} names, each must be given once and at least one")
    return tuple(wanted)


def background_rows(names: Sequence[str], size: int) -> Tensor:
    """Colours row by row: `(N, 3, size, 1)` float32, 0 to 255; the first row is `top`, the last one `bottom`."""
    top = torch.tensor([BACKGROUNDS[name].top for name in names], dtype=torch.float32)
    bottom = torch.tensor([BACKGROUNDS[name].bottom for name in names], dtype=torch.float32)
    share = torch.linspace(0, 1, size).view(1, 1, size, 1)
    return torch.lerp(top[:, :, None, None], bottom[:, :, None, None], share)
