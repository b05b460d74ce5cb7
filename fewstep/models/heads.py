"""Discriminator heads over tapped features: small, trained from scratch, and never bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import at_least_float32
from fewstep.errors import UserError


class Heads(nn.Module):
    """One head for each feature, together logits `(B, K)`."""

    def __init__(self, shapes: Sequence[Sequence[int]], width: int | None = None) -> None:
        """Heads for features of these shapes, without the batch.

        Args:
            shapes: `(C, H, W)` an image, `(N, D)` tokens, `(D,)` a vector; one for each head.
            width: channels inside a head; None is as many as the feature has, 64 at least.

        Raises:
            UserError: no shape, or one of none of these forms.
        """
        super().__init__()
        if not shapes:
            raise UserError("heads: no feature given, at least one is needed")
        self.heads = nn.ModuleList(_head(tuple(shape), width) for shape in shapes)

    @staticmethod
    def like(features: Sequence[Tensor], width: int | None = None) -> Heads:
        """Heads for features such as these, `(B, C, H, W)`, `(B, N, D)` or `(B, D)`, in float32 on their device."""
        heads = Heads([feature.shape[1:] for feature in features], width)
        return heads.to(features[0].device)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits `(B, K)`, at least float32, for `K` features in the order of the heads."""
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return at_least_float32(torch.cat(logits, dim=1))


class ConvHead(nn.Module):
    """4×4 convolutions of stride 2 down to 4×4 or less, one over what is left, then 1×1 (DMD2, arXiv 2405.14867).

    Of larger features than it was built for, which then leave more than one place, the logits are averaged.
    """

    def __init__(self, channels: int, height: int, width_px: int, width: int) -> None:
        """For features `(B, channels, height, width_px)`, with `width` channels inside."""
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width_px) > 4:
            layers += _shrink(channels, width, height, width_px)
            channels, height, width_px = width, _halved(height), _halved(width_px)
        last = nn.Conv2d(channels, width, kernel_size=(height, width_px))
        self.layers = nn.Sequential(*layers, last, _group_norm(width), nn.SiLU(), nn.Conv2d(width, 1, kernel_size=1))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, 1)` of features `(B, C, H, W)`."""
        return self.layers(_like_weights(feature, self)).mean(dim=(2, 3))


class TokenHead(nn.Module):
    """Each token normalised and put through one layer, then pooled with learned attention; any number of tokens."""

    def __init__(self, channels: int, width: int) -> None:
        """For features `(B, N, channels)`, with `width` channels inside."""
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU())
        self.attention = nn.Linear(width, 1)
        self.out = nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, 1)` of features `(B, N, D)`."""
        tokens = self.embed(_like_weights(feature, self))
        share = self.attention(tokens).softmax(dim=1)
        return self.out((share * tokens).sum(dim=1))


class VectorHead(nn.Module):
    """A plain multi-layer perceptron with two hidden layers."""

    def __init__(self, channels: int, width: int) -> None:
        """For features `(B, channels)`, with `width` channels inside."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, 1)` of features `(B, D)`."""
        return self.layers(_like_weights(feature, self))


def _head(shape: tuple[int, ...], width: int | None) -> nn.Module:
    width = width or max(64, shape[-3] if len(shape) == 3 else shape[-1])
    match shape:
        case (channels, height, width_px):
            return ConvHead(channels, height, width_px, width)
        case (_, channels):
            return TokenHead(channels, width)
        case (channels,):
            return VectorHead(channels, width)
        case _:
            raise UserError(f"heads: a feature of shape {shape} given, allowed are (C, H, W), (N, D) and (D,)")


def _shrink(channels: int, width: int, height: int, width_px: int) -> Sequence[nn.Module]:
    """Half the size along each side that is still larger than 4, the other one kept."""
    halve = [side > 4 for side in (height, width_px)]
    kernel, stride = [4 if yes else 3 for yes in halve], [2 if yes else 1 for yes in halve]
    conv = nn.Conv2d(channels, width, (kernel[0], kernel[1]), stride=(stride[0], stride[1]), padding=1)
    return conv, _group_norm(width), nn.SiLU()


def _halved(side: int) -> int:
    return side // 2 if side > 4 else side


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in DMD2, fewer where a group would have under 16 channels: at 1×1 those are all it has to norm."""
    groups = next(n for n in range(max(1, min(32, channels // 16)), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)


def _like_weights(feature: Tensor, head: nn.Module) -> Tensor:
    return feature.to(next(head.parameters()).dtype)
