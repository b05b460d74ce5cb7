"""Scores of generated images against fresh real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from fewstep.data.samples import ImageSet
from fewstep.errors import UserError

from .features import Extractor, Identity, extract
from .metrics import Moments, Score, accuracy, frechet_distance, kid

# Training counts samples from 0 and gets nowhere near.
_FIRST = 1 << 40
_STRIDE = 1 << 24


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them.

    Attributes:
        values: `(N, D)` float32 features.
        moments: their mean and covariance.
        features: which features.
        seed: which samples of the data set.
    """

    values: Tensor
    moments: Moments
    features: Identity
    seed: int


@dataclass(frozen=True)
class Scores:
    """What was measured on one set of generated images, with everything it depends on.

    Attributes:
        fd: Fréchet distance on `features`. Not "FID": that name belongs to one network from 2015.
        kid: kernel distance on `features`, with its standard error.
        accuracy: share of images that show the wanted class; None without labels or where the network knows no classes.
        images: number of generated images.
        real_images: number of real images.
        seconds_per_image: time to generate one image; None where it was not measured.
        features: name, size rule and weights of the feature network.
    """

    fd: Score
    kid: Score
    accuracy: Score | None
    images: int
    real_images: int
    seconds_per_image: float | None
    features: str

    def as_json(self) -> dict[str, float | int | str | None]:
        """Plain values for a report; standard errors are called `kid_stderr` and `accuracy_stderr`."""
        return {
            "fd": self.fd.value,
            "kid": self.kid.value,
            "kid_stderr": self.kid.stderr,
            "accuracy": self.accuracy.value if self.accuracy else None,
            "accuracy_stderr": self.accuracy.stderr if self.accuracy else None,
            "images": self.images,
            "real_images": self.real_images,
            "seconds_per_image": self.seconds_per_image,
            "features": self.features,
        }


def require_comparable(first: Scores, second: Scores) -> None:
    """Does nothing where two results may stand in one table.

    Raises:
        UserError: they were measured on other features or with other sample counts (the Fréchet distance of one and
            the same model falls as the count rises).
    """
    for name in ("features", "images", "real_images"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise UserError(f"scores: {name} is {one} here and {other} there, these results cannot be compared")


def real_indices(dataset: ImageSet, count: int, seed: int) -> Sequence[int]:
    """Positions of `count` real samples that belong to `seed`.

    An endless set is read where training never comes; of a finite one, `count` different samples are drawn.

    Raises:
        UserError: the set is too small, or fewer than three are wanted, which no distance can use.
    """
    if count < 3:
        raise UserError(f"reference: {count} images were asked for, at least 3 are needed")
    if dataset.length is None:
        start = _FIRST + seed * _STRIDE
        return range(start, start + count)
    if count > dataset.length:
        raise UserError(f"reference: found {dataset.length} images in the data set, {count} were asked for")
    return Random(seed).sample(range(dataset.length), count)


def reference(dataset: ImageSet, count: int, seed: int, extractor: Extractor) -> Reference:
    """Features of `count` real images.

    Raises:
        UserError: the set is too small, or its classes or image size are not those the network was trained for.
    """
    if extractor.classes is not None and tuple(dataset.classes) != extractor.classes:
        raise UserError(
            f"features {extractor.identity.name!r}: trained on {len(extractor.classes)} classes "
            f"({extractor.classes[0]}, ...), the data set has {len(dataset.classes)} others; "
            "efficientnet-lite0 takes every data set"
        )
    indices = real_indices(dataset, count, seed)
    parts = [extract(dataset.batch(indices[i : i + 500]).images, extractor).values for i in range(0, count, 500)]
    values = torch.cat(parts)
    return Reference(values, Moments.of(values), extractor.identity, seed)


def score_images(
    images: Tensor,
    labels: Tensor | None,
    reference: Reference,
    extractor: Extractor,
    seconds_per_image: float | None = None,
) -> Scores:
    """Measures generated images.

    Args:
        images: `(N, C, H, W)` floats in [-1, 1] or uint8.
        labels: `(N,)` wanted classes, or None.
        reference: real images, seen by the same extractor.
        extractor: the feature network.
        seconds_per_image: what making one image took, to be recorded.

    Raises:
        UserError: the reference was made with other features; too few, unfit or broken images; labels that do not fit.
    """
    if reference.features != extractor.identity:
        raise UserError(f"reference: made with {reference.features}, the images are seen by {extractor.identity}")
    seen = extract(images, extractor)
    return Scores(
        fd=Score(frechet_distance(reference.moments, Moments.of(seen.values))),
        kid=kid(reference.values, seen.values),
        accuracy=None if labels is None or seen.logits is None else accuracy(seen.logits, labels.cpu()),
        images=len(images),
        real_images=len(reference.values),
        seconds_per_image=seconds_per_image,
        features=str(extractor.identity),
    )
