"""Discriminator heads over tapped features: small, trained from scratch, and never bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import at_least_float32
from fewstep.errors import UserError
from fewstep.models.graft import sinusoid

HINT = 64  # width of what modulated heads are told


class Heads(nn.Module):
    """One head for each feature, together logits `(B, K)`."""

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        width: int | None = None,
        outputs: int = 1,
        classes: int | None = None,
    ) -> None:
        """Heads for features of these shapes, without the batch.

        Args:
            shapes: `(C, H, W)` an image, `(N, D)` tokens, `(D,)` a vector; one for each head.
            width: channels inside a head; None is as many as the feature has, 64 at least.
            outputs: logits of each head, for discriminators that answer several questions.
            classes: labels that a hint may carry; given, the heads are modulated by noise level and label.

        Raises:
            UserError: no shape, or one of none of these forms.
        """
        super().__init__()
        if not shapes:
            raise UserError("heads: no feature given, at least one is needed")
        self.outputs = outputs
        self.heads = nn.ModuleList(_head(tuple(shape), width, outputs) for shape in shapes)
        self.hint = None if classes is None else Hint(classes)
        films = [] if classes is None else [FiLM(shape[0] if len(shape) == 3 else shape[-1]) for shape in shapes]
        self.films = nn.ModuleList(films)

    @staticmethod
    def like(
        features: Sequence[Tensor], width: int | None = None, outputs: int = 1, classes: int | None = None
    ) -> Heads:
        """Heads for features such as these, `(B, C, H, W)`, `(B, N, D)` or `(B, D)`, in float32 on their device."""
        heads = Heads([feature.shape[1:] for feature in features], width, outputs, classes)
        return heads.to(features[0].device)

    def forward(
        self, features: Sequence[Tensor], log_ratio: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits `(B, K·outputs)`, at least float32, for `K` features; all heads' first output, then their second.

        Args:
            features: in the order of the heads.
            log_ratio: `(B,)` log σ/α of the samples; read by modulated heads alone, as are the labels.
            labels: `(B,)` their classes, where they have any.
        """
        if self.hint is not None:
            assert log_ratio is not None, "modulated heads are told the noise level"
            hint = self.hint(log_ratio, labels)
            features = [film(feature, hint) for film, feature in zip(self.films, features, strict=True)]
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return at_least_float32(torch.stack(logits, dim=2).flatten(1))


class Hint(nn.Module):
    """Noise level and class as one vector: LADD conditions its heads on both (arXiv 2403.12015)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.level = nn.Linear(HINT, HINT)
        self.label = nn.Embedding(classes, HINT) if classes else None

    def forward(self, log_ratio: Tensor, labels: Tensor | None = None) -> Tensor:
        """The vector `(B, HINT)` at log σ/α `(B,)`, which is cut to ±10, of samples with `labels` `(B,)`."""
        waves = sinusoid(at_least_float32(log_ratio).clamp(-10, 10), HINT).to(self.level.weight.dtype)
        told = self.level(waves)
        if self.label is not None:
            assert labels is not None, "these heads are told classes"
            told = told + self.label(labels)
        return nn.functional.silu(told)


class FiLM(nn.Module):
    """feature·(1 + scale) + shift, both linear in the hint and zero at the start (Perez et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.both = nn.Linear(HINT, 2 * channels)
        nn.init.zeros_(self.both.weight)
        nn.init.zeros_(self.both.bias)

    def forward(self, feature: Tensor, hint: Tensor) -> Tensor:
        """A feature `(B, C, H, W)`, `(B, N, C)` or `(B, C)` under a hint `(B, HINT)`."""
        axes = {4: (..., None, None), 3: (slice(None), None), 2: (slice(None),)}[feature.ndim]
        scale, shift = (part[axes] for part in self.both(hint).chunk(2, dim=1))
        return _like_weights(feature, self) * (1 + scale) + shift


class ConvHead(nn.Module):
    """4×4 convolutions of stride 2 down to 4×4 or less, one over what is left, then 1×1 (DMD2, arXiv 2405.14867).

    Of larger features than it was built for, which then leave more than one place, the logits are averaged.
    """

    def __init__(self, channels: int, height: int, width_px: int, width: int, outputs: int = 1) -> None:
        """For features `(B, channels, height, width_px)`, with `width` channels inside."""
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width_px) > 4:
            layers += _shrink(channels, width, height, width_px)
            channels, height, width_px = width, _halved(height), _halved(width_px)
        last = nn.Conv2d(channels, width, kernel_size=(height, width_px))
        self.layers = nn.Sequential(*layers, last, _group_norm(width), nn.SiLU(), nn.Conv2d(width, outputs, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, outputs)` of features `(B, C, H, W)`."""
        return self.layers(_like_weights(feature, self)).mean(dim=(2, 3))


class TokenHead(nn.Module):
    """Each token normalised and put through one layer, then pooled with learned attention; any number of tokens."""

    def __init__(self, channels: int, width: int, outputs: int = 1) -> None:
        """For features `(B, N, channels)`, with `width` channels inside."""
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU())
        self.attention = nn.Linear(width, 1)
        self.out = nn.Linear(width, outputs)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, outputs)` of features `(B, N, D)`."""
        tokens = self.embed(_like_weights(feature, self))
        share = self.attention(tokens).softmax(dim=1)
        return self.out((share * tokens).sum(dim=1))


class VectorHead(nn.Module):
    """A plain multi-layer perceptron with two hidden layers."""

    def __init__(self, channels: int, width: int, outputs: int = 1) -> None:
        """For features `(B, channels)`, with `width` channels inside."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `(B, outputs)` of features `(B, D)`."""
        return self.layers(_like_weights(feature, self))


def _head(shape: tuple[int, ...], width: int | None, outputs: int) -> nn.Module:
    width = width or max(64, shape[-3] if len(shape) == 3 else shape[-1])
    match shape:
        case (channels, height, width_px):
            return ConvHead(channels, height, width_px, width, outputs)
        case (_, channels):
            return TokenHead(channels, width, outputs)
        case (channels,):
            return VectorHead(channels, width, outputs)
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
