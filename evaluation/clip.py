"""CLIP by open_clip: features of images and of captions in one space."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError, did_you_mean

from .features import CUBIC, Features, Identity, resized, weights_sha256

PREFIX = "clip:"
_TEXTS = 64  # captions read at a time


class ClipFeatures:
    """The extractor `clip:ARCH:TAG_OR_PATH`: unit-length features of images and of captions."""

    classes = None
    gives_logits = False

    def __init__(self, argument: str, device: torch.device | str = "cpu"):
        """`argument` is `ARCH:TAG` or `ARCH:PATH` in open_clip's terms; a tag is looked for in its cache first.

        Raises:
            UserError: no such architecture, or the weights are not there.
        """
        self.device = torch.device(device)
        arch, _, weights = argument.partition(":")
        self._network = _load(arch, weights).to(self.device).requires_grad_(False).eval()
        visual = self._network.visual
        size = visual.image_size
        self._mean, self._std = (self._row(values) for values in (visual.image_mean, visual.image_std))
        side = size if isinstance(size, int) else size[0]
        self.identity = Identity(f"{PREFIX}{arch}", weights_sha256(self._network), side, CUBIC)
        self._tokenize = _tokenizer(arch)

    def _row(self, values: Sequence[float] | None) -> Tensor:
        assert values is not None, "open_clip's factory sets it"
        return torch.tensor(values, device=self.device).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        pixels = (resized(images, self.identity.size, self.device) / 255 - self._mean) / self._std
        return Features(F.normalize(self._network.encode_image(pixels).float(), dim=-1))

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """`(N, D)` unit-length features of N captions; equal captions are read once."""
        different = sorted(set(captions))
        parts = [
            F.normalize(
                self._network.encode_text(self._tokenize(different[i : i + _TEXTS]).to(self.device)).float(), dim=-1
            )
            for i in range(0, len(different), _TEXTS)
        ]
        rows = torch.tensor([different.index(caption) for caption in captions])
        return torch.cat(parts).cpu()[rows]


def _load(arch: str, weights: str) -> Any:
    import open_clip

    known = open_clip.list_models()
    if arch not in known:
        raise UserError(f"features 'clip': no architecture {arch!r} in open_clip{did_you_mean(arch, known)}; "
                        "the form is clip:ARCH:TAG_OR_PATH, as clip:ViT-B-32:weights.safetensors")  # fmt: skip
    if not weights:
        raise UserError(f"features 'clip': clip:{arch} names no weights; {_advice(arch)}")
    if not Path(weights).is_file() and weights not in open_clip.list_pretrained_tags_by_model(arch):
        near = did_you_mean(weights, open_clip.list_pretrained_tags_by_model(arch))
        raise UserError(f"features 'clip': {weights!r} is no file and no tag of {arch}{near}; {_advice(arch)}")
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.WARNING))  # it tells of every file it opens
    try:
        return open_clip.create_model(arch, pretrained=weights, require_pretrained=True)
    except Exception as error:  # downloads and readers of foreign files raise what they like
        raise UserError(f"features 'clip': the weights {weights!r} of {arch} cannot be had; {_advice(arch)}") from error


def _tokenizer(arch: str) -> Any:
    import open_clip

    return open_clip.get_tokenizer(arch)


def _advice(arch: str) -> str:
    return (f"save them as a file and give its path (clip:{arch}:PATH); without a network connection, "
            "efficientnet-lite0 works for every figure but those on captions")  # fmt: skip
