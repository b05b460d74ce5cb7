"""What a feature network is to every metric, and the one way from samples to the pixels it sees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.errors import UserError

# Fixed, and not the caller's batch size: figures must not move with the batch that made the samples.
_CHUNK = 100


@dataclass(frozen=True)
class Identity:
    """Which features a figure was measured on. Figures on different identities cannot be compared.

    Attributes:
        name: the name that `extractor` takes.
        sha256: hash of the weight file.
        size: height and width that the network sees, in pixels.
        resize: how an image of another size gets there; "none" where other sizes are refused.
    """

    name: str
    sha256: str
    size: int
    resize: str

    def __str__(self) -> str:
        return f"{self.name}@{self.size} resize={self.resize} sha256:{self.sha256[:12]}"


@dataclass(frozen=True)
class Features:
    """What a feature network says about N images.

    Attributes:
        values: `(N, D)` float32.
        logits: `(N, K)` float32 over the classes of the data; None where the network does not know them.
    """

    values: Tensor
    logits: Tensor | None = None


class Extractor(Protocol):
    """A frozen feature network, in evaluation mode whatever is done to modules around it."""

    @property
    def identity(self) -> Identity:
        """Name, weights and size rule."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that its logits stand for; None where it gives no logits."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """Features of `images`, `(B, 3, H, W)` or `(B, 1, H, W)` uint8."""
        ...


def to_uint8(images: Tensor) -> Tensor:
    """Pixels as they would be shown or saved: clamp to [-1, 1], scale to 0..255, round to the nearest.

    Truncating instead of rounding shifts a Fréchet distance by a third of what a visible blur adds, and casting without
    the clamp wraps 1.02 around to 4.

    Args:
        images: `(B, C, H, W)` floats, nominally in [-1, 1]; uint8 is returned as it is.

    Returns:
        `(B, C, H, W)` uint8.

    Raises:
        UserError: not a batch of images, other integers, values that are not finite, or floats from 0 to 255.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images: found shape {tuple(images.shape)}, allowed are (B, 3, H, W) and (B, 1, H, W)")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise UserError(f"images: found {images.dtype}, allowed are uint8 and floats in [-1, 1]")
    _check_values(images)
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _check_values(images: Tensor) -> None:
    if not len(images):
        return
    low, high = images.amin().item(), images.amax().item()  # both are NaN as soon as one pixel is
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        raise UserError(
            f"images: {broken} of {len(images)} hold NaN or infinite pixels, nothing can be measured on them"
        )
    if low >= 0 and high > 8:
        raise UserError(f"images: found floats from {low:.3g} to {high:.3g}, allowed are floats in [-1, 1] and uint8")


def as_rgb(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` from `(B, 1, H, W)` or `(B, 3, H, W)`."""
    return images.expand(-1, 3, -1, -1)


def extract(images: Tensor, extractor: Extractor) -> Features:
    """Features of any number of images, in chunks of a fixed size.

    Args:
        images: `(N, C, H, W)` floats in [-1, 1] or uint8.
        extractor: the feature network.

    Returns:
        Features on the CPU.

    Raises:
        UserError: see `to_uint8`; or N is zero.
    """
    if not len(images):
        raise UserError("images: found none, at least one is needed")
    parts = [extractor(to_uint8(chunk)) for chunk in images.split(_CHUNK)]
    logits = [part.logits.cpu() for part in parts if part.logits is not None]
    return Features(torch.cat([part.values.cpu() for part in parts]), torch.cat(logits) if logits else None)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
