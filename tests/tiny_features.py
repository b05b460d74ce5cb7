"""Feature networks of tests: means of pixels, and a CLIP of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MEANS = f"module:{__name__}.Means"


class Means(nn.Module):
    """Features that are means of pixels."""

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C)` of `(B, C, H, W)`."""
        return images.float().mean(dim=(2, 3))


def save_clip(folder: Path, name: str, side: int, shake: float = 0.0) -> Path:
    """Its weights as safetensors, of an architecture `name` that open_clip now knows, for pictures of `side` pixels.

    Shaken weights tell prompts apart.
    """
    tower = {"width": 16, "layers": 1}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": side, "patch_size": 8, "head_width": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False)
        for parameter in model.parameters():
            parameter.data += shake * torch.randn_like(parameter)
    save_file(model.state_dict(), folder / "clip.safetensors")
    return folder / "clip.safetensors"
