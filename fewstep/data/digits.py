"""Scikit-learn's handwritten digits, 8 × 8: the smallest real images, for fast tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fewstep.data.samples import Samples
from fewstep.errors import UserError, did_you_mean

SPLITS = ("train", "held_out")
_EVERY = 10  # one digit in ten is held out
_BRIGHTEST = 16


class Digits:
    """1,797 grey digits; every tenth one is held out.

    Args:
        split: "train" (1,618 digits) or "held_out" (179).

    Raises:
        UserError: scikit-learn is not installed, or the split is unknown.
    """

    shape = (1, 8, 8)
    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str = "train") -> None:
        if split not in SPLITS:
            raise UserError(f"digits split: found {split!r}, allowed are {SPLITS}{did_you_mean(split, SPLITS)}")
        images, labels = _load()
        chosen = (np.arange(len(images)) % _EVERY == _EVERY - 1) == (split == "held_out")
        self._images = torch.from_numpy(images[chosen]).float()[:, None] / (_BRIGHTEST / 2) - 1
        self._labels = torch.from_numpy(labels[chosen]).long()

    @property
    def length(self) -> int:
        """Number of digits."""
        return len(self._images)

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Sequence[int]) -> Samples:
        """The digits at `indices`: images `(B, 1, 8, 8)` in [-1, 1] and labels 0 to 9.

        Raises:
            IndexError: an index below 0 or past the last digit.
        """
        rows = torch.as_tensor(list(indices), dtype=torch.int64)
        if rows.numel() and int(rows.min()) < 0:
            raise IndexError("digits: an index is below 0")
        return Samples(self._images[rows], self._labels[rows])


def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data.name: digits needs scikit-learn; install fewstep[data]") from error
    pixels, labels = load_digits(return_X_y=True)
    return np.reshape(pixels, (-1, 8, 8)), np.asarray(labels)
