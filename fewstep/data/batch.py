"""What the loader hands to a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.conditioning import Condition
from fewstep.models.transfer import sent


@dataclass(frozen=True)
class Batch:
    """Clean samples with their conditions.

    Attributes:
        x: `(B, C, H, W)` images in [-1, 1], scaled latents, or `(B, D)` vectors.
        condition: what the network is told about each sample.
        index: `(B,)` int64, the position of each sample in its data set.
    """

    x: Tensor
    condition: Condition
    index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(sent(self.x, device), self.condition.to(device), self.index)
