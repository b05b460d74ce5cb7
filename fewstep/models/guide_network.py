"""A small network beside a frozen one, whose features guide its decoder; it can be plugged into fine-tuned networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.injection import Injection, Told, blocks_of, hidden_shapes, silent, taken_up

NAME = "guide"


class Guide(Injection):
    """Features of x_t, the guidance scale, the time and the condition, one for each block of a decoder.

    Images go down a pyramid of convolutions with a level for each resolution of the blocks, vectors through layers of
    one size. Every feature ends in a zero layer, as in a ControlNet: an untrained guide changes nothing. It never reads
    the network that it guides.
    """

    def __init__(
        self, blocks: tuple[str, ...], shapes: tuple[torch.Size, ...], x: torch.Size, told: Told, channels: int
    ) -> None:
        super().__init__(blocks)
        self.told = told
        self.factors = tuple(_factor(shape, x) for shape in shapes)
        self.tokens = tuple(len(shape) == 3 for shape in shapes)
        self.places = tuple(sorted(set(self.factors)))
        self.first = _first(x, channels, self.places[0])
        self.levels = nn.ModuleList(_Level(channels, told.width, len(x) == 4) for _ in self.places)
        sizes = (shape[1] if len(shape) == 4 else shape[-1] for shape in shapes)
        self.outs = nn.ModuleList(silent(nn.Linear(channels, size)) for size in sizes)
        self.features: dict[int, Tensor] = {}

    def hear(self, sample: Tensor, scale: Tensor, told: Mapping[str, Any]) -> None:
        """All levels of the pyramid."""
        heard = self.told(scale, told["timestep"], told)
        h, reached = self.first(sample), self.places[0]
        for factor, level in zip(self.places, self.levels, strict=True):
            h = level(h if factor == reached else nn.functional.avg_pool2d(h, factor // reached), heard)
            self.features[factor], reached = h, factor

    def addition(self, index: int, hidden: Tensor) -> Tensor:
        """The feature at the block's resolution, with the block's channels."""
        h = self.features[self.factors[index]]
        if h.ndim == 2:
            return self.outs[index](h)
        out = self.outs[index](h.movedim(1, -1))
        return out.flatten(1, 2) if self.tokens[index] else out.movedim(-1, 1)

    def forget(self) -> None:
        """Lets go of the features and their graph."""
        self.features = {}


class _Level(nn.Module):
    """Two layers, convolutions for images, whose hidden units hear what is told."""

    def __init__(self, channels: int, width: int, image: bool) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, channels, 3, padding=1) if image else nn.Linear(channels, channels) for _ in range(2)
        )
        self.tell = nn.Linear(width, 2 * channels)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        gain, shift = self.tell(told).view(len(h), -1, *(1,) * (h.ndim - 2)).chunk(2, dim=1)
        inner = self.one(nn.functional.silu(h)) * (1 + gain) + shift
        return h + self.two(nn.functional.silu(inner))


def _is_picture(x: torch.Size, shapes: tuple[torch.Size, ...]) -> bool:
    """Whether x is vectors or `(1, C, H, W)`, and every block's output has a place for each square of its pixels."""
    if len(x) == 2:
        return True
    return len(x) == 4 and all(_pixels(shape) * _factor(shape, x) ** 2 == x[-2:].numel() for shape in shapes)


def _pixels(block: torch.Size) -> int:
    return block[-2:].numel() if len(block) == 4 else block[1]


def _factor(block: torch.Size, x: torch.Size) -> int:
    """How many pixels of x `(1, C, H, W)` a side of a pixel or token of the block spans; 0 for vectors."""
    if len(x) == 2:
        return 0
    return math.isqrt(x[-2:].numel() // _pixels(block))


def _first(x: torch.Size, channels: int, factor: int) -> nn.Module:
    if not factor:
        return nn.Linear(x[1], channels)
    if factor == 1:
        return nn.Conv2d(x[1], channels, 3, padding=1)
    return nn.Conv2d(x[1], channels, factor, stride=factor)


def guide_for(
    denoiser: NetworkDenoiser, scales: tuple[float, float], example: Batch, channels: int, width: int
) -> Guide:
    """An untrained guide for a network and all fine-tuned ones of its architecture.

    Args:
        denoiser: a conditional network.
        scales: the range of guidance scales that the guide will be trained for.
        example: one sample, for shapes.
        channels: of the guide's own features.
        width: of its embedding of scale, time and condition.

    Raises:
        UserError: what its blocks put out is no picture.
    """
    blocks = blocks_of(denoiser.network, "decoder")
    shapes = hidden_shapes(denoiser, blocks, example)
    if denoiser.family.one_stream or not _is_picture(example.x.shape, shapes):
        kind, block = type(denoiser.network).__name__, tuple(shapes[0][1:])
        raise UserError(f"student: {kind} computes {block} of a sample {tuple(example.x.shape[1:])}, which is no grid "
                        "that a guide's features fit on; agd's adapters take it")  # fmt: skip
    return Guide(blocks, shapes, example.x.shape, Told.of(denoiser, scales, example, width), channels)


def with_guide(denoiser: NetworkDenoiser, guide: Guide) -> NetworkDenoiser:
    """The denoiser, its network frozen, changed in place and guided by a copy of `guide`, which stays as it is.

    A guide that an earlier run has left in it is trained on in place of that.

    Raises:
        UserError: LoRA adapters share the network's weights.
    """
    earlier = taken_up(denoiser, NAME, guide.told.scales)
    return copy.deepcopy(guide).install(denoiser, NAME, guide.told.scales) if earlier is None else earlier


def guide_of(denoiser: NetworkDenoiser) -> Guide:
    """The guide that `with_guide` put into its network."""
    guide = denoiser.network.get_submodule(NAME)
    assert isinstance(guide, Guide)
    return guide
