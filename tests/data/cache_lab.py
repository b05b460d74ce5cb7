"""As much of a pipeline and of a set of pictures as a cache needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

CAPTIONS = ("a red fish", "a bird", "a red fish", "a frog on a stone", "a bird", "an owl", "a red fish")


def teacher(folder: Path, network: str = "UNet2DConditionModel", width: int = 6) -> Path:
    """As much of a pipeline as a cache looks at."""
    parts = {"vae": {"latent_channels": 4}, "text_encoder": {"hidden_size": width}, "unet": {"_class_name": network}}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"_diffusers_version": "0", **config}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", network]}))
    return folder


def pictures(folder: Path, captions: Sequence[str] = CAPTIONS, side: int = 8) -> Path:
    folder.mkdir()
    for i, caption in enumerate(captions):
        image = Image.new("RGB", (side, side), (40 * i, 255 - 30 * i, 90))
        image.putpixel((0, 0), (255, 255, 255))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Name and content of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def gone(path: Path) -> None:
    path.unlink()


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
