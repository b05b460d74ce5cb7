"""Stored pairs of a teacher: the noise a trajectory starts from, and the sample it ends at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.transfer import sent
from fewstep.rng import Rng

_CONDITION = "condition."


@dataclass(frozen=True)
class Pair:
    """Some noises `(B, *)`, the teacher's samples `(B, *)` from them, and their conditions."""

    noise: Tensor
    x0: Tensor
    condition: Condition


@dataclass(frozen=True)
class Pairs:
    """A whole set of pairs, kept on the host.

    Attributes:
        stored: all pairs.
        device: where a draw lies.
    """

    stored: Pair
    device: torch.device

    @staticmethod
    def open(path: Path | None, weight: float, example: Batch) -> Pairs | None:
        """The pairs of a regression of that weight; None where the weight is 0.

        Raises:
            UserError: no file is given, it cannot be read, or its samples are of another shape than the data.
        """
        if not weight:
            return None
        return Pairs.required(path, example, "method.regression_weight")

    @staticmethod
    def required(path: Path | None, example: Batch, needed_by: str) -> Pairs:
        """The pairs of a file, for what a config's user knows as `needed_by`.

        Raises:
            UserError: no file is given, it cannot be read, its samples are of another shape than the data, or they
                have no labels where the data has, or the other way round.
        """
        if path is None:
            raise UserError(f"method.pairs: missing; {needed_by} needs the file that `fewstep pairs` makes")
        stored = load_pairs(path)
        if stored.x0.shape[1:] != example.x.shape[1:]:
            found, needed = tuple(stored.x0.shape[1:]), tuple(example.x.shape[1:])
            raise UserError(f"method.pairs: {path} holds samples of shape {found}, the data's are {needed}")
        if (stored.condition.labels is None) != (example.condition.labels is None):
            has, lacks = ("the data", path) if stored.condition.labels is None else (path, "the data")
            raise UserError(f"method.pairs: {has} has class labels, {lacks} has none; make pairs with the run's config")
        return Pairs(stored, example.x.device)

    def draw(self, rng: Rng, batch: int) -> Pair:
        """`batch` pairs, drawn with replacement; all processes together draw what one would for their common batch."""
        rows = rng.rows(len(self.stored.x0), batch)
        pair = Pair(self.stored.noise[rows], self.stored.x0[rows], self.stored.condition.rows(rows))
        return Pair(sent(pair.noise, self.device), sent(pair.x0, self.device), pair.condition.to(self.device))


def save_pairs(path: Path, pair: Pair) -> None:
    """Write pairs as safetensors, to a temporary name first."""
    tensors = {"noise": pair.noise, "x0": pair.x0}
    tensors |= {_CONDITION + key: value for key, value in pair.condition.batched.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    os.replace(partial, path)


def load_pairs(path: Path) -> Pair:
    """Read pairs.

    Raises:
        UserError: the file is missing or not one of `fewstep pairs`.
    """
    try:
        tensors = load_file(path)
        condition = {k.removeprefix(_CONDITION): v for k, v in tensors.items() if k.startswith(_CONDITION)}
        return Pair(tensors["noise"], tensors["x0"], Condition(condition))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"method.pairs: {path} cannot be read as pairs ({str(error).splitlines()[0]})") from error
