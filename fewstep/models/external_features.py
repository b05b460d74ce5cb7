"""Features of a network that never saw noise: EfficientNet-Lite0 in a score network's clothes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser, freeze
from fewstep.models.efficientnet import PACKAGE as PACKAGE
from fewstep.models.efficientnet import Trunk, load_lite0
from fewstep.models.families import Family
from fewstep.models.lora import Adapters

TAPS = ("parts.0", "parts.1", "parts.2", "parts.3")
"""Sub-modules to read: 24, 40, 112 and 320 channels at 1/4, 1/8, 1/16 and 1/32 of the size."""


class ExternalNetwork(nn.Module):
    """The classifier's convolutions, called as a score network is; they look at the sample alone."""

    def __init__(self, trunk: Trunk, size: int) -> None:
        """For samples of any size, which are brought to `size` pixels along each side, a multiple of 32."""
        super().__init__()
        self.parts = trunk.parts  # first, so that taps find them under these names
        self.trunk, self.size = trunk, size

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **condition: object
    ) -> tuple[Tensor]:
        """The sample itself: what counts is what the parts put out on the way.

        `sample` `(B, 3 or 1, H, W)` in [-1, 1]; timestep and condition are not read.
        """
        pixels = sample.float().expand(-1, 3, -1, -1)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", align_corners=False)
        self.trunk(127.5 * (pixels + 1))
        return (sample,)


def external_features(like: NetworkDenoiser, example: Batch, size: int) -> NetworkDenoiser:
    """The frozen classifier on the process and with the null condition of `like`, to be tapped at `TAPS`.

    Args:
        like: the score network in whose place it stands.
        example: one sample `(1, *)` of the data.
        size: height and width that it sees, a multiple of 32.

    Raises:
        UserError: the samples are no pixels, or the weights are not installed.
    """
    if example.x.ndim != 4 or example.x.shape[1] not in (1, 3):
        shape = tuple(example.x.shape[1:])
        raise UserError(f"features 'efficientnet-lite0': samples of shape {shape} given, it sees (3 or 1, H, W) pixels")
    network = ExternalNetwork(load_lite0().trunk, size)
    freeze(network).to(example.x.device)
    family = Family("network", "sample", lambda network: TAPS[-1])
    return NetworkDenoiser(network, family, like.process, Kind.X0, like.null, Adapters(network))
