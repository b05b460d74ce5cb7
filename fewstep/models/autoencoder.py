"""Images to latents and back, as a pipeline's denoiser takes them: scaled, shifted, packed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.families import Family

_VIDEO = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLCogVideoX")
"""Classes that take images as videos of one frame."""

_PROBE = 64
_CPU = torch.device("cpu")

Draws = torch.Generator | list[torch.Generator] | None
"""What a posterior is drawn with: one stream, or one for each sample; None: nothing is drawn, its mode is taken."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A VAE beside its denoiser.

    z = ((e − shift_factor − mean)/std)·scaling_factor of what the VAE says, e, each where its config states it;
    FLUX.2's mean and std are those of its batch norm, over patches of 2×2.

    Attributes:
        vae: of diffusers.
        family: of the denoiser.
        device: where the VAE computes.
    """

    vae: Any
    family: Family
    device: torch.device = _CPU

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Draws = None) -> Tensor:
        """Latents `(B, *)` of images `(B, 3, H, W)` or videos `(B, 3, F, H, W)`, in float32.

        Raises:
            UserError: a side is not a multiple of what the VAE and the packing need.
        """
        for side in images.shape[-2:]:
            self._check(side)
        return self._packed(self._scaled(self._encoded(images.to(self.device), generator)))

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1], or videos `(B, 3, F, H, W)`.

        Args:
            latents: `(B, *)`.
            size: height and width of the images in pixels, which packed latents do not tell; None: they are square.

        Raises:
            UserError: packed latents are of images of another size.
        """
        unscaled = self._unscaled(self._unpacked(latents.to(self.device), size))
        decoded = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
        return decoded[:, :, 0] if decoded.ndim == 5 and decoded.shape[2] == 1 else decoded

    def shape(self, side: int | tuple[int, int]) -> tuple[int, ...]:
        """The shape `(*)` of the latents of one image, square or of that height and width.

        Raises:
            UserError: a side is not a multiple of what the VAE and the packing need.
        """
        channels, *frames = self._probe[:-2]
        rows, columns = self._grid(side if isinstance(side, tuple) else (side, side))
        if self.family.packed:
            return (rows // 2 * (columns // 2), 4 * channels)
        grid = (channels, *frames, rows, columns)
        return grid if self.family.frames != 1 else (*frames, channels, rows, columns)

    def side(self, rows: int) -> int:
        """Height or width in pixels of images whose latents, not packed, have so many rows or columns."""
        return rows * (_PROBE // self._probe[-1])

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the latents of an image of that height and width in pixels."""
        for side in size:
            self._check(side)
        rows, columns = (self._probe[-1] * side // _PROBE for side in size)
        return rows, columns

    @cached_property
    def has_posterior(self) -> bool:
        """Whether an image's latents are drawn from a distribution; of some autoencoders it has one and no other."""
        with torch.no_grad():
            return not isinstance(self._said(self._blank), Tensor)

    @property
    def _blank(self) -> Tensor:
        return torch.zeros(1, 3, _PROBE, _PROBE, device=self.device)

    @cached_property
    def _probe(self) -> tuple[int, ...]:
        """The shape of an image of 64 pixels' latents, not packed."""
        with torch.no_grad():
            return tuple(self._encoded(self._blank, None).shape[1:])

    def _check(self, side: int) -> None:
        unit = _PROBE // self._probe[-1] * (2 if self.family.packed else 1)
        if side < unit or side % unit:
            raise UserError(f"side: {side} pixels given; {type(self.vae).__name__} here takes multiples of {unit}")

    def _encoded(self, images: Tensor, generator: Draws) -> Tensor:
        as_video, said = self._as_video(images), self._said(images)
        if not isinstance(said, Tensor):  # a distribution
            said = said.mode() if generator is None else said.sample(generator)
        return (said[:, :, 0] if as_video and self.family.frames is None else said).float()

    def _as_video(self, images: Tensor) -> bool:
        return type(self.vae).__name__ in _VIDEO and images.ndim == 4

    def _said(self, images: Tensor) -> Any:
        """Latents of images, or a distribution of them."""
        given = images.unsqueeze(2) if self._as_video(images) else images
        return self.vae.encode(given.to(self.vae.dtype), return_dict=False)[0]

    def _scaled(self, said: Tensor) -> Tensor:
        if (norm := self._batch_norm(said)) is not None:
            return _unpatched((_patched(said) - norm[0]) / norm[1])
        mean, std = self._moments(said)
        return (said - self._shift - mean) / std * self._scale

    def _unscaled(self, z: Tensor) -> Tensor:
        if (norm := self._batch_norm(z)) is not None:
            return _unpatched(_patched(z) * norm[1] + norm[0])
        mean, std = self._moments(z)
        return z * std / self._scale + mean + self._shift

    @property
    def _scale(self) -> float:
        return self.vae.config.get("scaling_factor") or 1.0

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of each channel: 0 and 1 where the config states none."""
        shape = (1, -1, *(1,) * (like.ndim - 2))
        stated = (self.vae.config.get("latents_mean") or [0.0], self.vae.config.get("latents_std") or [1.0])
        mean, std = (torch.tensor(values, device=like.device).view(shape) for values in stated)
        return mean, std

    def _batch_norm(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        epsilon = self.vae.config.get("batch_norm_eps")
        if epsilon is None:
            return None
        norm = self.vae.bn
        mean, variance = (value.view(1, -1, 1, 1).to(like) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + epsilon).sqrt()

    def _packed(self, z: Tensor) -> Tensor:
        if self.family.packed:
            return _patched(z).flatten(2).transpose(1, 2)
        return z.transpose(1, 2) if self.family.frames == 1 else z

    def _unpacked(self, latents: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.family.packed:
            grid = _unpatched(latents.transpose(1, 2).unflatten(2, self._tokens(latents.shape[1], size)))
            return grid.unsqueeze(2) if type(self.vae).__name__ in _VIDEO else grid
        return latents.transpose(1, 2) if self.family.frames == 1 else latents

    def _tokens(self, count: int, size: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of so many tokens."""
        if size is None:
            rows = columns = math.isqrt(count)
        else:
            rows, columns = (length // 2 for length in self._grid(size))
        if rows * columns != count:
            given = "none given" if size is None else f"{size[0]}×{size[1]} pixels given"
            raise UserError(f"size: {given}; {count} tokens are of images of another height and width")
        return rows, columns


def _patched(z: Tensor) -> Tensor:
    """`(B, C, H, W)` as `(B, 4C, H/2, W/2)`."""
    return torch.nn.functional.pixel_unshuffle(z, 2)


def _unpatched(z: Tensor) -> Tensor:
    """`(B, 4C, H/2, W/2)` as `(B, C, H, W)`."""
    return torch.nn.functional.pixel_shuffle(z, 2)
