"""Which networks look at the images of a data set, and which figures come of it; refused here where they do not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.data.samples import ImageSet
from fewstep.errors import UserError

from .cache import Cache, remembered
from .classifier import shipped_classifier
from .evaluators import Evaluator, Figures, View, evaluators
from .extrapolation import least
from .features import Extractor
from .metrics import Score

CAPTION = "a picture of a {}"
"""What a class is called for CLIP, for real and generated images alike."""


@dataclass(frozen=True)
class Panel:
    """Made once for any number of sources.

    Attributes:
        extractor: whose features distances are taken on.
        classifier: that says which class an image shows; None where accuracy is not asked for.
        evaluators: by name.
        classes: the data's, by number.
        prompted: whether generated images were asked for by prompts, beside which classes count for nothing.
    """

    extractor: Extractor
    classifier: Extractor | None
    evaluators: Mapping[str, Evaluator]
    classes: tuple[str, ...]
    prompted: bool = False

    @classmethod
    def of(
        cls,
        dataset: ImageSet,
        extractor: Extractor,
        metrics: Sequence[str] | None,
        count: int,
        labelled: bool = True,
        more: Sequence[str] = (),
        prompts: int = 0,
    ) -> Panel:
        """For `count` images on each side.

        Args:
            dataset: the real images.
            extractor: the feature network.
            metrics: names; None: fd, kid, and accuracy where there is a classifier of the data's classes.
            count: images on each side.
            labelled: whether generated images come with the class they were asked for.
            more: names beside `metrics`.
            prompts: how many different ones `count` images are asked for by; 0: by none.

        Raises:
            UserError: the network does not take such images or cannot give what a figure needs, or there are too few.
        """
        _check_classes(dataset, extractor)
        classifier = _classifier(dataset, extractor) if labelled else None
        names = metrics if metrics is not None else ("fd", "kid", *(["accuracy"] if classifier else []))
        chosen = evaluators((*names, *more))
        for name, one in chosen.items():
            _check(name, one, dataset, extractor, classifier, count, labelled, prompts)
        if "fd_infinity" in chosen:
            _check_extrapolation(dataset, extractor, count)
        needed = any(one.needs == "classes" for one in chosen.values())
        return cls(extractor, classifier if needed else None, chosen, tuple(dataset.classes), prompts > 0)

    @classmethod
    def bare(cls, dataset: ImageSet, extractor: Extractor) -> Panel:
        """The feature network alone.

        Raises:
            UserError: it was trained for another data set.
        """
        _check_classes(dataset, extractor)
        return cls(extractor, None, {}, tuple(dataset.classes))

    def look(
        self,
        images: Tensor,
        labels: Tensor | None,
        cache: Cache | None = None,
        captions: Sequence[str] | None = None,
    ) -> View:
        """What the networks say about uint8 images `(N, C, H, W)` of the classes `labels` `(N,)`, or of captions."""
        features = remembered(images, self.extractor, cache)
        logits = None
        if self.classifier is not None and labels is not None:
            same = self.classifier is self.extractor
            logits = (features if same else remembered(images, self.classifier, cache)).logits
        if self.prompted:
            labels = None if captions is None else torch.tensor([_number(caption) for caption in captions])
        return View(features, logits, None if labels is None else labels.cpu(), self._texts(labels, captions))

    def score(self, real: View, fake: View) -> Figures:
        """All figures of `fake`, in the order they were asked for."""
        figures: dict[str, Score] = {}
        for one in self.evaluators.values():
            figures.update(one.measure(real, fake))
        return figures

    def floor(self, real: View, others: View) -> Figures:
        """The figures of other real images in the place of generated ones: those that need nothing they lack."""
        known = {name: one for name, one in self.evaluators.items() if not (self.prompted and _lacks(others, one))}
        return replace(self, evaluators=known).score(real, others)

    def _texts(self, labels: Tensor | None, captions: Sequence[str] | None) -> Tensor | None:
        if self.extractor.text is None or "clip" not in self.evaluators:
            return None
        if not self.prompted:
            captions = None if labels is None else [CAPTION.format(self.classes[label]) for label in labels.tolist()]
        return None if captions is None else self.extractor.text(captions)


def _number(caption: str) -> int:
    """The same for equal captions, whoever looks at them."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8]) >> 1


def _lacks(view: View, one: Evaluator) -> bool:
    """Captions, or two images of one caption."""
    if one.needs == "captions":
        return view.texts is None
    return one.better == "as real" and (view.labels is None or len(view.labels.unique()) == len(view))


def _check_classes(dataset: ImageSet, extractor: Extractor) -> None:
    if extractor.classes is not None and tuple(dataset.classes) != extractor.classes:
        raise UserError(
            f"features {extractor.identity.name!r}: trained on {len(extractor.classes)} classes "
            f"({extractor.classes[0]}, ...), the data set has {len(dataset.classes)} others; "
            "efficientnet-lite0 takes every data set"
        )


def _classifier(dataset: ImageSet, extractor: Extractor) -> Extractor | None:
    """The feature network itself where it knows the data's classes, else the shipped classifier where that does."""
    if extractor.classes is not None:
        return extractor
    shipped = shipped_classifier(extractor.device)
    size = (shipped.identity.size,) * 2
    fits = tuple(dataset.classes) == shipped.classes and tuple(dataset.shape[1:]) == size
    return shipped if fits else None


def _check(
    name: str,
    one: Evaluator,
    dataset: ImageSet,
    extractor: Extractor,
    classifier: Extractor | None,
    count: int,
    labelled: bool,
    prompts: int,
) -> None:
    found, names = extractor.identity.name, len(dataset.classes)
    if not found.startswith(one.network):
        raise UserError(f"metrics: {name} is kept for the features {one.network.rstrip(':')!r}, found {found!r}; "
                        f"on these it is called {one.elsewhere}")  # fmt: skip
    if one.needs == "logits" and not extractor.gives_logits:
        raise UserError(f"metrics: {name} needs logits, the features {found!r} give none; classifier, "
                        "efficientnet-lite0 and inception from its .pth file do")  # fmt: skip
    if one.needs == "captions" and extractor.text is None:
        raise UserError(f"metrics: {name} needs features that read captions (clip:ARCH:TAG_OR_PATH), found {found!r}")
    if one.needs == "classes" and prompts:
        raise UserError(f"metrics: {name} needs classes, and the source takes prompts")
    if one.needs in ("captions", "classes") and not (prompts or (labelled and names)):
        raise UserError(f"metrics: {name} needs classes, and the source takes or the reference names none")
    if one.needs == "classes" and classifier is None:
        raise UserError(f"metrics: {name} needs a classifier of the reference's {names} classes; the shipped one knows "
                        "those of emoji32, another is given as --features classifier:FOLDER")  # fmt: skip
    if one.better == "as real" and count == prompts:
        raise UserError(f"metrics: {name} needs two images of a prompt, and each of the {count} has one of its own; "
                        "ask for more images, or by fewer prompts")  # fmt: skip
    if one.better == "as real" and labelled and count <= names:
        raise UserError(f"metrics: {name} needs two images of a class, more than {names} images for {names} classes; "
                        f"{count} were asked for")  # fmt: skip
    if count < one.least:
        raise UserError(f"metrics: {name} needs at least {one.least} images on each side, {count} were asked for")


@torch.no_grad()
def _check_extrapolation(dataset: ImageSet, extractor: Extractor, count: int) -> None:
    blank = torch.zeros(1, *dataset.shape, dtype=torch.uint8)
    width = extractor(blank).values.shape[1]
    if count < least(width):
        raise UserError(
            f"--fd-infinity: {least(width)} images are needed for {width} features (four each), {count} were asked for"
        )
