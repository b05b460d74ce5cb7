"""EfficientNet-Lite0 as a feature network: 1280 features, and ImageNet's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.efficientnet import SHA256, load_lite0

from .features import Features, Identity, resized

SIZE = 96


class Lite0Features:
    """The extractor `efficientnet-lite0`. Its logits are over ImageNet's classes, not over those of the data."""

    identity = Identity("efficientnet-lite0", SHA256, SIZE, "bicubic-antialias")
    classes = None
    text = None
    gives_logits = True

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = load_lite0().to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        values = self.network(resized(images, SIZE, self.device))
        return Features(values, self.network.classify(values))
