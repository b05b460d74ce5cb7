"""Samples of a closed-form mixture as a data set: the data of `fewstep verify`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fewstep.data.counter import uniforms
from fewstep.data.samples import Samples
from fewstep.diffusion.gaussian import GaussianMixture


class MixtureSet:
    """An endless set of vectors `(B, D)` from a mixture; sample i is a pure function of the seed and of i."""

    length = None

    def __init__(self, mixture: GaussianMixture, seed: int = 0) -> None:
        self._mixture, self._seed = mixture, seed

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimension D."""
        return (self._mixture.dim,)

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels as names; empty for a mixture without them."""
        return tuple(str(label) for label in range(self._mixture.n_classes or 0))

    def batch(self, indices: Sequence[int]) -> Samples:
        """The vectors at `indices`, with the class of the component each was drawn from."""
        index = np.asarray(indices, dtype=np.uint64)
        u = torch.from_numpy(uniforms(self._seed, "component", index))
        columns = [uniforms(self._seed, f"coordinate {d}", index) for d in range(self._mixture.dim)]
        quantiles = torch.from_numpy(np.stack(columns, axis=1)).clamp(1e-12, 1 - 1e-12)
        x = self._mixture.transform(u, torch.special.ndtri(quantiles)).float()
        return Samples(x, self._labels(u))

    def _labels(self, u: torch.Tensor) -> torch.Tensor | None:
        if self._mixture.labels is None:
            return None
        cumulative = self._mixture.weights.cumsum(0)
        chosen = torch.searchsorted(cumulative, u, right=True).clamp_max(len(cumulative) - 1)
        return self._mixture.labels[chosen]
