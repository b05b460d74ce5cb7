"""Laying sprites over a background, with resampling that is exact to the bit.

A sprite drawn d pixels wide shrinks its 64 pixels by 64 / d. Each output pixel takes the mean of the sprite over the
area it covers; both axes are independent (sprites are moved and scaled, never turned), so that a whole batch is two
batched matrix products, and no pyramid of smaller sprites is needed.

The weights are whole multiples of 1/256 and the sprites whole numbers up to 255, so every product and every partial
sum is a whole multiple of 2**-16 below 256 and fits the 24 bits of a float32. The order of summation then cannot
matter: a scene is the same in every batch, on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_STEPS = 256


def coverage(centre: Tensor, width: Tensor, size: int, tile: int) -> Tensor:
    """How much each of `tile` sprite pixels counts in each of `size` output pixels.

    Args:
        centre: `(B,)` middle of the drawn sprite on the canvas, in output pixels from its left or upper edge.
        width: `(B,)` width of the drawn sprite in output pixels.
        size: output pixels.
        tile: sprite pixels.

    Returns:
        `(B, size, tile)` multiples of 1/256. A row sums to exactly one inside the sprite and to the covered part of
        the pixel at its edge. Where the sprite is enlarged the window is one sprite pixel wide, which is linear
        interpolation.
    """
    step = (tile / width)[:, None, None]
    window = step.clamp(min=1.0)
    pixel = torch.arange(size, dtype=width.dtype).view(1, size, 1) + 0.5
    start = tile / 2 + (pixel - centre[:, None, None]) * step - window / 2
    edges = torch.arange(tile + 1, dtype=width.dtype)
    covered = ((edges - start) / window).clamp_(0.0, 1.0)
    return covered.mul_(WEIGHT_STEPS).round_().diff(dim=2) / WEIGHT_STEPS


def draw(sprites: Tensor, x: Tensor, y: Tensor, width: Tensor, flip: Tensor, size: int) -> Tensor:
    """Sprites placed on an empty canvas.

    Args:
        sprites: `(B, 4, T, T)` colours times alpha, and alpha; whole numbers 0 to 255.
        x: `(B,)` middle of each sprite from the left edge, in output pixels.
        y: `(B,)` middle of each sprite from the upper edge, in output pixels.
        width: `(B,)` width and height of each drawn tile, in output pixels.
        flip: `(B,)` bool, true where the sprite is mirrored.
        size: canvas size.

    Returns:
        `(B, 4, size, size)`, 0 to 255.
    """
    batch, _, tile, _ = sprites.shape
    rows = coverage(y, width, size, tile)
    columns = coverage(x, width, size, tile)
    columns = torch.where(flip[:, None, None], columns.flip(2), columns)
    with torch.autocast("cpu", enabled=False):  # a bfloat16 product would not be exact
        wide = torch.bmm(sprites.reshape(batch, 4 * tile, tile), columns.transpose(1, 2)).view(batch, 4, tile, size)
        return torch.matmul(rows[:, None], wide)


def over(layer: Tensor, canvas: Tensor) -> Tensor:
    """`layer` `(B, 4, S, S)` with colours times alpha in [0, 255], laid over `canvas` `(B, 3, S, S)` in [0, 255]."""
    return layer[:, :3] + canvas * (1 - layer[:, 3:] / 255)
