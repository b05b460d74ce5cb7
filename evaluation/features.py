"""What a feature network is to every metric, and the one way from samples to the pixels it sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError

CHUNK = 100
"""Images a feature network sees at a time. Fixed: figures must not move with the batch that made the samples."""

CUBIC = "bicubic-antialias"
"""The resize rule of `resized`."""


@dataclass(frozen=True)
class Identity:
    """Which features a figure was measured on. Figures on different identities cannot be compared.

    Attributes:
        name: the name that `extractor` takes, without the path of a file.
        sha256: hash of the weights.
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
        logits: `(N, K)` float32 over the classes that the network knows; None where it names none.
    """

    values: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """All of `parts`, one after the other."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.values for part in parts]), torch.cat(logits) if logits else None)


class Extractor(Protocol):
    """A frozen feature network, in evaluation mode whatever is done to modules around it."""

    @property
    def identity(self) -> Identity:
        """Name, weights and size rule."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the data's classes, where its logits stand for them; else None."""
        ...

    @property
    def gives_logits(self) -> bool:
        """Whether `Features.logits` is there."""
        ...

    @property
    def text(self) -> Callable[[Sequence[str]], Tensor] | None:
        """`(N, D)` features of N captions in the space of the images; None where it reads no text."""
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


def resized(images: Tensor, size: int, device: torch.device) -> Tensor:
    """`(B, 3, size, size)` float32 in 0...255 from uint8 `(B, 3 or 1, H, W)`; the aspect ratio is not kept.

    The cubic with antialiasing, cut to the range of pixels: equal to clean-fid's resizing by Pillow in float.
    """
    full = as_rgb(images).to(device, torch.float32)
    if full.shape[-2:] != (size, size):
        full = F.interpolate(full, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return full.contiguous(memory_format=torch.channels_last)


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
    parts = [extractor(to_uint8(chunk)) for chunk in images.split(CHUNK)]
    whole = Features.joined(parts)
    return Features(whole.values.cpu(), None if whole.logits is None else whole.logits.cpu())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's tensors with their names, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
