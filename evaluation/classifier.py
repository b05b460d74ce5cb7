"""The small classifier of the embedded emoji set: 64 features for distances, logits for accuracy.

It ships with the package (`fewstep/data/assets/classifiers/`) and is made by `scripts/train_classifier.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError

from .features import Features, Identity, as_rgb, file_sha256

CONFIG_FILE, WEIGHT_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """What has to be known to build the network.

    Attributes:
        classes: name of every class by number.
        size: height and width of the images, in pixels.
        channels: outputs of the convolutions; each but the first and the last halves the image.
    """

    classes: tuple[str, ...]
    size: int = 32
    channels: tuple[int, ...] = (24, 48, 64, 64, 64)


class Classifier(nn.Module):
    """Convolutions with GroupNorm, mean-pooled: no batch statistics, so one image never sees another."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        inputs = (3, *config.channels[:-1])
        last = len(config.channels) - 1
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, 2 if 0 < n < last else 1, padding=1)
            for n, (i, o) in enumerate(zip(inputs, config.channels, strict=True))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, outputs) for outputs in config.channels)
        self.head = nn.Linear(config.channels[-1], len(config.classes))

    def features(self, x: Tensor) -> Tensor:
        """`(B, 64)` from images `(B, 3, size, size)` in [-1, 1]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, K)` logits from images `(B, 3, size, size)` in [-1, 1]."""
        return self.head(self.features(x))


class ClassifierFeatures:
    """The extractor `classifier`. Takes images of its own size only: resized ones would not be what it learnt."""

    text = None
    gives_logits = True

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = load_classifier(folder).to(self.device)
        config = self.network.config
        self.classes: tuple[str, ...] | None = config.classes
        self.identity = Identity("classifier", file_sha256(folder / WEIGHT_FILE), config.size, "none")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        size = self.identity.size
        if images.shape[-2:] != (size, size):
            raise UserError(
                f"features 'classifier': found images of {images.shape[-1]}x{images.shape[-2]} pixels, allowed are "
                f"{size}x{size}; efficientnet-lite0 takes every size"
            )
        values = self.network.features(as_rgb(images).to(self.device, torch.float32) / 127.5 - 1)
        return Features(values, self.network.head(values))


def shipped_classifier(device: torch.device | str = "cpu") -> ClassifierFeatures:
    """The classifier of `emoji32` that comes with the package."""
    with as_file(files("fewstep.data") / "assets" / "classifiers" / "emoji32") as folder:
        return ClassifierFeatures(folder, device)


def load_classifier(folder: Path) -> Classifier:
    """A trained classifier from `config.json` and `model.safetensors`, float32, frozen.

    Raises:
        UserError: one of the files is missing.
    """
    for name in (CONFIG_FILE, WEIGHT_FILE):
        if not (folder / name).is_file():
            raise UserError(f"classifier {folder}: there is no {name}; scripts/train_classifier.py makes one")
    written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    network = Classifier(ClassifierConfig(tuple(written["classes"]), written["size"], tuple(written["channels"])))
    network.load_state_dict(load_file(folder / WEIGHT_FILE))
    return network.float().requires_grad_(False).eval()
