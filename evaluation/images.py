"""Scores of generated images against fresh real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from torch import Tensor

from fewstep.data.samples import ImageSet
from fewstep.errors import UserError

from .cache import Cache, pixels_sha256
from .evaluators import Figures, View, evaluators
from .features import Extractor, Identity, to_uint8
from .metrics import Score
from .panel import Panel

# Training counts samples from 0 and gets nowhere near.
_FIRST = 1 << 40
_STRIDE = 1 << 24
_CHUNK = 500  # real images in memory at once, and in one entry of the cache


@dataclass(frozen=True)
class Reference:
    """Real images as feature networks see them.

    Attributes:
        view: what is known of them.
        floor: the same of other real images, against which the real ones have their own figures; None: not asked for.
        features: which features.
        sha256: hash of their pixels.
        seed: which samples of the data set.
    """

    view: View
    floor: View | None
    features: Identity
    sha256: str
    seed: int


_TERMS = ("features", "images", "real_images", "reference_sha256", "floor_images", "classifier", "prompts_sha256")


@dataclass(frozen=True)
class Scores:
    """What was measured on one set of generated images, with everything it depends on.

    Attributes:
        figures: by name, as `fd` (Fréchet distance on `features`; the name "fid" is kept for one network from 2015).
        images: number of generated images.
        real_images: number of real images.
        seconds_per_image: time to generate one image; None where it was not measured.
        features: name, size rule and weights of the feature network.
        reference_sha256: hash of the real images' pixels.
        floor: the figures of other real images in the place of generated ones, below which no model can be expected;
            empty where they were not measured.
        floor_images: number of these other images; 0 for none. Of a finite data set, both may be halves of it.
        classifier: identity of the network behind `accuracy`; empty where there is none.
        prompts_sha256: hash of the prompts that the images were asked for by; None where there were none.
    """

    figures: Figures
    images: int
    real_images: int
    seconds_per_image: float | None
    features: str
    reference_sha256: str = ""
    floor: Figures = field(default_factory=dict)
    floor_images: int = 0
    classifier: str = ""
    prompts_sha256: str | None = None

    @property
    def fd(self) -> Score:
        """Fréchet distance on `features`."""
        return self.figures["fd"]

    @property
    def kid(self) -> Score:
        """Kernel distance on `features`, with its standard error."""
        return self.figures["kid"]

    @property
    def accuracy(self) -> Score | None:
        """Share of images that show the wanted class; None without labels or where no network knows the classes."""
        return self.figures.get("accuracy")

    def as_json(self) -> dict[str, Any]:
        """Plain values for a report; the standard error of `kid` is called `kid_stderr`, and so on."""
        return {
            **_plain(self.figures),
            **({} if "accuracy" in self.figures else {"accuracy": None, "accuracy_stderr": None}),
            "images": self.images,
            "real_images": self.real_images,
            "seconds_per_image": self.seconds_per_image,
            "features": self.features,
            "classifier": self.classifier,
            "reference_sha256": self.reference_sha256,
            "floor": _plain(self.floor),
            "floor_images": self.floor_images,
            **({} if self.prompts_sha256 is None else {"prompts_sha256": self.prompts_sha256}),
        }


def _plain(figures: Figures) -> dict[str, float | None]:
    """Values, and beside each that has one its standard error."""
    plain: dict[str, float | None] = {}
    for name, score in figures.items():
        plain[name] = score.value
        if score.stderr is not None:
            plain[f"{name}_stderr"] = score.stderr
    return plain


def require_comparable(first: Scores, second: Scores) -> None:
    """Does nothing where two results may stand in one table.

    Raises:
        UserError: see `require_same_terms`.
    """
    require_same_terms(first.as_json(), second.as_json())


def require_same_terms(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """The same for results as plain values, as `as_json` gives and files hold them.

    Raises:
        UserError: they were measured on other features (which say weights and size rule), other real images, with
            another classifier, or with other sample counts (the Fréchet distance of one and the same model falls as the
            count rises).
    """
    for name in _TERMS:
        if here.get(name) != there.get(name):
            raise UserError(
                f"scores: {name} is {here.get(name)} here and {there.get(name)} there, these results cannot be compared"
            )


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


def reference(
    dataset: ImageSet,
    count: int,
    seed: int,
    extractor: Extractor,
    *,
    panel: Panel | None = None,
    floor: bool = False,
    cache: Cache | None = None,
) -> Reference:
    """`count` real images as feature networks see them.

    Args:
        dataset: the real images.
        count: how many.
        seed: which.
        extractor: the feature network.
        panel: it and the others that look; None: it alone.
        floor: whether to look at as many other real images too; where a finite set has fewer than twice `count`, at
            the rest, and both sides of the floor are as small as that.
        cache: of features.

    Raises:
        UserError: the set is too small, or its classes or image size are not those the network was trained for.
    """
    panel = panel or Panel.bare(dataset, extractor)
    indices = real_indices(dataset, count, seed)
    digest, views = hashlib.sha256(), []
    for start in range(0, count, _CHUNK):
        views.append(_look(dataset, indices[start : start + _CHUNK], panel, cache, digest))
    others = _others(dataset, indices, count, seed) if floor else ()
    beside = [_look(dataset, others[i : i + _CHUNK], panel, cache, None) for i in range(0, len(others), _CHUNK)]
    rest = View.joined(beside) if beside else None
    return Reference(View.joined(views), rest, extractor.identity, digest.hexdigest(), seed)


def _look(dataset: ImageSet, indices: Sequence[int], panel: Panel, cache: Cache | None, digest: Any) -> View:
    batch = dataset.batch(indices)
    pixels = to_uint8(batch.images)
    if digest is not None:
        digest.update(pixels_sha256(pixels).encode())
    return panel.look(pixels, batch.labels, cache, batch.captions)


def _others(dataset: ImageSet, indices: Sequence[int], count: int, seed: int) -> Sequence[int]:
    """Up to `count` positions that are not among `indices`."""
    if dataset.length is None:
        start = indices[0] + count
        return range(start, start + count)
    taken = set(indices)
    free = [i for i in range(dataset.length) if i not in taken]
    return Random(seed).sample(free, min(count, len(free)))


def floor_of(panel: Panel, real: Reference) -> Figures:
    """The figures of real images among themselves; empty where there are too few others for one of them.

    Where there are fewer others than real images, as many of the real ones are taken, for equal counts.
    """
    if real.floor is None:
        return {}
    try:
        return panel.floor(real.view.first(len(real.floor)), real.floor)
    except UserError:
        return {}


def score_images(
    images: Tensor,
    labels: Tensor | None,
    reference: Reference,
    extractor: Extractor,
    seconds_per_image: float | None = None,
) -> Scores:
    """The Fréchet distance, the kernel distance and, where the network knows classes, accuracy of generated images.

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
    knows = extractor.classes is not None and labels is not None
    names = ("fd", "kid", "accuracy") if knows else ("fd", "kid")
    panel = Panel(extractor, extractor if knows else None, evaluators(names), extractor.classes or ())
    view = panel.look(to_uint8(images), labels)
    return scored(panel, view, reference, {}, seconds_per_image)


def scored(panel: Panel, view: View, real: Reference, floor: Figures, seconds_per_image: float | None = None) -> Scores:
    """The result of one set of generated images, which `panel` has looked at as it has at the real ones."""
    return Scores(
        figures=panel.score(real.view, view),
        images=len(view),
        real_images=len(real.view),
        seconds_per_image=seconds_per_image,
        features=str(real.features),
        reference_sha256=real.sha256,
        floor=floor,
        floor_images=len(real.floor) if floor and real.floor is not None else 0,
        classifier="" if panel.classifier is None else str(panel.classifier.identity),
    )
