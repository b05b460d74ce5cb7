"""A small residual network for vectors: the student of `fewstep verify`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VectorConfig:
    """Sizes of a VectorNetwork, and the moments of its data.

    Attributes:
        dim: D of the samples `(B, D)`.
        classes: labels 0 to classes − 1, and `classes` for the null label; 0 is unconditional.
        mean: `(D,)` of the data.
        std: one scale of the data.
        width: of the hidden layers.
        depth: number of residual layers.
    """

    dim: int
    classes: int
    mean: tuple[float, ...]
    std: float
    width: int = 128
    depth: int = 3


class VectorNetwork(nn.Module):
    """Predicts the flow velocity ε − x_0 at `sample` `(B, D)`, from its input scaled to unit variance.

    The network's own output F sees and says numbers of order one: x̂_0 = mean + std·(c_skip·z + c_out·F) with EDM's
    coefficients for unit data at the noise ratio κ = σ/(α·std), z the scaled input (Karras et al. 2022, table 1).
    """

    mean: Tensor
    frequencies: Tensor

    def __init__(self, config: VectorConfig) -> None:
        super().__init__()
        self.vector = config
        self.config = {"num_class_embeds": config.classes + 1} if config.classes else {}
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.frequencies = nn.Buffer(2.0 ** torch.arange(0, 4), persistent=False)
        features = config.dim + 1 + 2 * len(self.frequencies)
        self.first = nn.Linear(features, config.width)
        self.labels = nn.Embedding(config.classes + 1, config.width) if config.classes else None
        self.middle = nn.Sequential(*(_Residual(config.width) for _ in range(config.depth)))
        self.last = nn.Linear(config.width, config.dim)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The velocity `(B, D)` at flow times `timestep`/1000 `(B,)`."""
        t = (timestep / 1000).to(sample.dtype)[:, None]
        std, mean = self.vector.std, self.mean
        variance = ((1 - t) * std) ** 2 + t**2
        centred = sample - (1 - t) * mean
        z = centred / variance.sqrt()
        out = self._hidden(z, t, class_labels)
        # x̂_0 − mean = (1−t)·std²/variance·centred + t·std/√variance·F, and the velocity is (x − x̂_0)/t, where the
        # division by t cancels: no time is singular.
        skip = (t - (1 - t) * std**2) / variance
        return (skip * centred - mean - std / variance.sqrt() * out,)

    def _hidden(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        # The log of the noise ratio spreads the times a mixture changes at; bounded at both ends.
        level = 0.25 * torch.log((t + 1e-3) / ((1 - t + 1e-3) * self.vector.std))
        waves = level * self.frequencies * 1.5
        h = self.first(torch.cat([z, level, waves.sin(), waves.cos()], dim=1))
        if self.labels is not None:
            assert labels is not None, "a conditional VectorNetwork needs class_labels"
            h = h + self.labels(labels)
        return self.last(self.middle(nn.functional.silu(h)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + nn.functional.silu(self.linear(h))
