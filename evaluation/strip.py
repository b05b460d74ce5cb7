"""The first samples of a sampler side by side in one PNG, without loss: what a report keeps of them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fewstep.errors import UserError

from .features import as_rgb, to_uint8

GAP = 2  # pixels between two images on the page
_SIDE = "image width"  # the key under which a strip says how wide one of its images is


def save_strip(path: Path, images: Tensor) -> None:
    """Write `images` `(N, C, H, W)`, floats in [-1, 1] or uint8, from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = as_rgb(to_uint8(images)).permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()
    partial = path.with_name(f".{path.name}.partial")
    told = PngInfo()
    told.add_text(_SIDE, str(images.shape[-1]))
    Image.fromarray(np.ascontiguousarray(pixels)).save(partial, format="PNG", pnginfo=told)
    os.replace(partial, path)


def read_strip(path: Path) -> Tensor:
    """The images `(N, 3, H, W)` uint8 of a strip.

    Raises:
        UserError: the file is no strip.
    """
    try:
        with Image.open(path) as picture:
            width, pixels = int(picture.info[_SIDE]), torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"report: {path} is no strip of samples; remove it and measure its row anew") from error
    return torch.stack(pixels.split(width, dim=1)).permute(0, 3, 1, 2)


def spaced(path: Path) -> bytes:
    """A strip as a PNG with transparent gaps, so that the page's own colour is between the images."""
    images = read_strip(path).permute(0, 2, 3, 1).numpy()
    height, width = images.shape[1:3]
    out = np.zeros((height, len(images) * (width + GAP) - GAP, 4), dtype=np.uint8)
    for i, image in enumerate(images):
        left = i * (width + GAP)
        out[:, left : left + width, :3], out[:, left : left + width, 3] = image, 255
    stream = io.BytesIO()
    Image.fromarray(out).save(stream, format="PNG")
    return stream.getvalue()
