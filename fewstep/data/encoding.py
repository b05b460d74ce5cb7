"""A data set whose pictures and captions the run encodes itself, batch by batch, in place of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.caching import CaptionEncoder, padded, same
from fewstep.data.counter import random_words
from fewstep.data.prompts import PromptList, no_pixels
from fewstep.data.samples import Dataset, Samples, Unlabelled
from fewstep.errors import UserError
from fewstep.models.conditioning import LENGTHS, Condition

_SOME = ("a", "a red fox on a green hill")
_LONGEST = " ".join(["word"] * 2000)  # more than any text encoder takes


@dataclass(frozen=True, eq=False)
class Encoded:
    """Latents with the conditions of their captions, or with class labels, of a data set of pictures.

    A loader's workers prepare pictures and captions; they are encoded where the loader is read, on the encoder's
    device. A sample is the same in every batch, up to rounding.

    Attributes:
        pixels: the set.
        encoder: of the teacher's pipeline.
        shape: of one sample's latents.
        null: the null condition, of one sample; None where the teacher takes class labels, or nothing.
        draws: seed of the draws from the VAE's posterior, another one at every visit; None: its mode is taken.
        at_once: samples that are encoded together.
    """

    pixels: Dataset
    encoder: CaptionEncoder
    shape: tuple[int, ...]
    null: Condition | None
    draws: int | None = None
    at_once: int = 16
    _lengths: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(pixels: Dataset, encoder: CaptionEncoder, prompts: bool, draws: int | None, at_once: int) -> Encoded:
        """The set with its null condition.

        Raises:
            UserError: text encoders or VAE are missing, the images' side does not fit, or the condition of a prompt
                does not go with that of none.
        """
        shape = tuple(encoder.latent_shape(pixels.shape[-1]))
        if not prompts:
            return Encoded(pixels, encoder, shape, None, draws, at_once)
        null = encoder.null()
        lengths = _lengths(encoder, null)
        return Encoded(pixels, encoder, shape, _long(null, lengths), draws, at_once, lengths)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty where samples have prompts."""
        return self.pixels.classes if self.null is None else ()

    @property
    def length(self) -> int | None:
        """The set's."""
        return self.pixels.length

    def unlabelled(self) -> Encoded:
        """The same without labels, for an unconditional network."""
        return replace(self, pixels=Unlabelled(self.pixels))

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`, encoded here and now; latents are the posterior's mode."""
        samples = self.pixels.batch(indices)
        told = Condition.none() if samples.labels is None else Condition.of_labels(samples.labels)
        raw = Batch(samples.images, told, torch.tensor(indices))
        made = replace(self, draws=None).encoded(raw, samples.captions, np.zeros(len(indices), dtype=np.int64))
        return Samples(made.x, samples.labels if self.null is None else None, condition=made.condition)

    @torch.no_grad()
    def encoded(self, batch: Batch, captions: Sequence[str] | None, places: NDArray[np.int64]) -> Batch:
        """A batch of the set, encoded.

        Args:
            batch: pictures `(B, 3, H, W)` with class labels or nothing.
            captions: one a picture.
            places: of each sample in the run's endless sequence, from which its draw follows.

        Raises:
            UserError: a caption cannot be encoded.
        """
        parts = [self._encoded(batch.x[rows], places[rows]) for rows in _parts(len(batch.x), self.at_once)]
        if self.null is None:
            return Batch(torch.cat(parts), batch.condition, batch.index)
        assert captions is not None
        return Batch(torch.cat(parts), self.told(captions), batch.index)

    @torch.no_grad()
    def told(self, captions: Sequence[str]) -> Condition:
        """The conditions of captions, in float32, as long as the longest there can be.

        Raises:
            UserError: one cannot be encoded.
        """
        return Condition.cat([self._told(captions[rows]) for rows in _parts(len(captions), self.at_once)])

    def _encoded(self, images: Tensor, places: NDArray[np.int64]) -> Tensor:
        if isinstance(self.pixels, PromptList):
            return no_pixels(len(images), self.shape)
        if self.draws is None:
            return self.encoder.latents(images)
        seeds = random_words(self.draws, "draws from the posterior", places.astype(np.uint64)) >> np.uint64(1)
        return self.encoder.latents(images, [torch.Generator().manual_seed(seed) for seed in seeds.tolist()])

    def _told(self, captions: Sequence[str]) -> Condition:
        condition = self.encoder.prompts(captions)
        batched = {k: v.float() if v.is_floating_point() else v for k, v in condition.batched.items()}
        return _long(Condition(batched, condition.shared), self._lengths)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _lengths(encoder: CaptionEncoder, null: Condition) -> dict[str, int]:
    """Tokens of the longest prompt there can be, for each tensor that is not equally long for all prompts.

    Raises:
        UserError: prompts cannot be told beside each other and beside none.
    """
    some = [encoder.prompts([caption]) for caption in _SOME]
    for one in some:
        _require_alike(one, null)
    if len({_tokens(one) for one in (*some, null)}) == 1:
        return {}
    told = [dict(_tokens(one)) for one in (*some, null, encoder.prompts([_LONGEST]))]
    lengths = {key: {one[key] for one in told} for key in told[0]}
    grown = {key: max(found) for key, found in lengths.items() if len(found) > 1}
    for key in grown:
        if not any("mask" in other for other in grown):
            raise UserError(f"data.name: the teacher's {key!r} is of another length for some prompts, and no mask "
                            "tells which tokens count")  # fmt: skip
    return grown


def _require_alike(one: Condition, null: Condition) -> None:
    if one.batched.keys() != null.batched.keys():
        raise UserError(f"data.name: the teacher is told {sorted(one.batched)} with a prompt and "
                        f"{sorted(null.batched)} without; both must be the same")  # fmt: skip
    for key, value in null.shared.items():
        if not same(value, one.shared.get(key)):
            raise UserError(f"data.name: the teacher's {key!r} differs from prompt to prompt, which no batch can hold")


def _tokens(condition: Condition) -> tuple[tuple[str, int], ...]:
    """Tokens of a row, by tensor; lists are left out, for they are padded where batches meet."""
    told = condition.batched
    return tuple((k, v.shape[1]) for k, v in told.items() if v.ndim > 1 and LENGTHS + k not in told)


def _long(condition: Condition, lengths: dict[str, int]) -> Condition:
    """The condition with zeros behind, so that all prompts are equally long."""
    batched = {k: padded(v, lengths[k]) if k in lengths else v for k, v in condition.batched.items()}
    return Condition(batched, condition.shared)
