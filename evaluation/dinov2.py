"""DINOv2 by transformers: the features that Stein et al. 2023 (arXiv:2306.04675) propose for the Fréchet distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError

from .features import CUBIC, Features, Identity, resized, weights_sha256

NAME = "dinov2"
DEFAULT = "facebook/dinov2-large"
_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DinoFeatures:
    """The extractor `dinov2:FOLDER_OR_NAME`: the class token after the last normalisation, at 224 pixels."""

    classes = None
    text = None
    gives_logits = False

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """`place` is a folder, or a hub name that is in the hub's cache already; nothing is downloaded.

        Raises:
            UserError: it is not there, or is another model.
        """
        self.device = torch.device(device)
        self._network = _load(place).to(self.device).requires_grad_(False).eval()
        self.identity = Identity(NAME, weights_sha256(self._network), _SIZE, CUBIC)
        self._mean, self._std = (torch.tensor(row, device=self.device).view(1, 3, 1, 1) for row in (_MEAN, _STD))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pixels = (resized(images, _SIZE, self.device) / 255 - self._mean) / self._std
        return Features(self._network(pixel_values=pixels).pooler_output.float())


def _load(place: str) -> Any:
    from transformers import AutoConfig, Dinov2Model

    try:
        kind = AutoConfig.from_pretrained(place, local_files_only=True).model_type
    except (OSError, ValueError) as error:
        raise UserError(f"features 'dinov2': {place!r} is no folder with a model, and not in the hub's cache; "
                        f"{_advice()}") from error  # fmt: skip
    if kind != "dinov2":
        raise UserError(f"features 'dinov2': {place!r} holds a model of the kind {kind!r}; {_advice()}")
    try:
        return Dinov2Model.from_pretrained(place, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"features 'dinov2': {place!r} has no weights in safetensors; {_advice()}") from error


def _advice() -> str:
    return (f"put a copy of {DEFAULT} into a folder (config.json, model.safetensors) and give its path "
            "(dinov2:FOLDER); without a network connection, efficientnet-lite0 works")  # fmt: skip
