"""Small conditioned adapters in a frozen network, which make its prediction the guided one in a single evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.injection import Injection, Told, blocks_of, hidden_shapes, silent, taken_up

NAME = "guidance_adapters"


class Adapter(nn.Module):
    """A bottleneck on a block's output whose hidden units hear scale, time and condition; zero until trained.

    A low-rank adapter has one weight for all scales, times and conditions: it can learn one guided network, or the
    average of several. Here the same weights serve every scale.
    """

    def __init__(self, size: int, rank: int, width: int) -> None:
        super().__init__()
        self.down, self.tell, self.up = nn.Linear(size, rank), nn.Linear(width, 2 * rank), nn.Linear(rank, size)
        silent(self.up)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        """What is added to `hidden`: `(B, C, H, W)`, tokens `(B, N, C)` or vectors `(B, C)`."""
        image = hidden.ndim == 4
        h = hidden.movedim(1, -1) if image else hidden
        h = self.down(nn.functional.layer_norm(h, h.shape[-1:]))
        gain, shift = self.tell(told).view(len(h), *(1,) * (h.ndim - 2), -1).chunk(2, dim=-1)
        out = self.up(nn.functional.silu(h * (1 + gain) + shift))
        return out.movedim(-1, 1) if image else out


class GuidanceAdapters(Injection):
    """An adapter in every block, and the embedding of scale, time and condition that they share."""

    def __init__(self, blocks: tuple[str, ...], sizes: tuple[int, ...], told: Told, rank: int, width: int) -> None:
        super().__init__(blocks)
        self.told, self.heard = told, torch.empty(0)
        self.adapters = nn.ModuleList(Adapter(size, rank, width) for size in sizes)

    def hear(self, sample: Tensor, scale: Tensor, told: Mapping[str, Any]) -> None:
        """Embeds scale, time and condition, once for all blocks."""
        self.heard = self.told(scale, told["timestep"], told)

    def addition(self, index: int, hidden: Tensor) -> Tensor:
        """The adapter's output."""
        return self.adapters[index](hidden, self.heard)

    def forget(self) -> None:
        """Lets go of the embedding and its graph."""
        self.heard = torch.empty(0)


def with_adapters(
    denoiser: NetworkDenoiser, scales: tuple[float, float], example: Batch, rank: int, width: int
) -> NetworkDenoiser:
    """The denoiser with its weights frozen and guidance adapters in its network, equal to it until they are trained.

    Adapters that an earlier run has left in it are trained on, whatever their rank and width.

    Args:
        denoiser: a conditional network, changed in place.
        scales: the range of guidance scales that they will be trained for.
        example: one sample, for shapes.
        rank: hidden units of each adapter.
        width: of the embedding of scale, time and condition.

    Raises:
        UserError: LoRA adapters share its weights, or it has no blocks.
    """
    if (earlier := taken_up(denoiser, NAME, scales)) is not None:
        return earlier
    blocks = blocks_of(denoiser.network)
    shapes = hidden_shapes(denoiser, blocks, example)
    sizes = tuple(shape[1] if len(shape) == 4 else shape[-1] for shape in shapes)
    told = Told.of(denoiser, scales, example, width)
    return GuidanceAdapters(blocks, sizes, told, rank, width).install(denoiser, NAME, scales)


def guidance_adapters(denoiser: NetworkDenoiser) -> GuidanceAdapters:
    """The adapters that `with_adapters` put into its network."""
    adapters = denoiser.network.get_submodule(NAME)
    assert isinstance(adapters, GuidanceAdapters)
    return adapters
