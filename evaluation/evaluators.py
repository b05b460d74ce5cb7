"""Every figure by its name, under one call: what is known of real images, what of generated ones, to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import UserError, did_you_mean

from . import clip, inception, lpips
from .extrapolation import fd_infinity
from .features import Features
from .metrics import Moments, Score, accuracy, frechet_distance, kid, mmd
from .neighbours import NEAREST, neighbourhoods
from .spread import SPLITS, clip_score, diversity, inception_score

Figures = Mapping[str, Score]


@dataclass(frozen=True)
class View:
    """A set of N images as feature networks see it.

    Attributes:
        features: of the network that distances are taken on.
        class_logits: `(N, K)` over the data's classes, by the network that knows them; or None.
        labels: `(N,)` classes that were asked for, of real images their own, or numbers of prompts; or None.
        texts: `(N, D)` features of the captions; or None.
    """

    features: Features
    class_logits: Tensor | None = None
    labels: Tensor | None = None
    texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        return Moments.of(self.features.values)

    def first(self, count: int) -> View:
        """The first `count` images."""
        if count == len(self):
            return self
        cut = (None if one is None else one[:count] for one in (self.class_logits, self.labels, self.texts))
        logits = None if self.features.logits is None else self.features.logits[:count]
        return View(Features(self.features.values[:count], logits), *cut)

    @staticmethod
    def joined(parts: Sequence[View]) -> View:
        """All of `parts`, one after the other."""
        return View(
            Features.joined([part.features for part in parts]),
            _joined([part.class_logits for part in parts]),
            _joined([part.labels for part in parts]),
            _joined([part.texts for part in parts]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@dataclass(frozen=True)
class Evaluator:
    """A figure, or several that come together.

    Attributes:
        measure: from real and generated images to scores by figure.
        better: how a good model's figure compares with a bad one's; "as real": nearest to that of real images.
        least: images it needs on each side.
        needs: beside features; what the feature network or the data must give.
        network: the only features it goes by this name on; empty for all.
        elsewhere: its name on other features.
    """

    measure: Callable[[View, View], Figures]
    better: Literal["lower", "higher", "as real"] = "lower"
    least: int = 3
    needs: Literal["", "logits", "classes", "captions"] = ""
    network: str = ""
    elsewhere: str = ""


def _fd(real: View, fake: View) -> Score:
    return Score(frechet_distance(real.moments, fake.moments))


def _kid(real: View, fake: View) -> Score:
    return kid(real.features.values, fake.features.values)


def _mmd(real: View, fake: View) -> Score:
    return mmd(real.features.values, fake.features.values)


def _pr(real: View, fake: View) -> Figures:
    shares = neighbourhoods(real.features.values, fake.features.values)
    return {"precision": shares.precision, "recall": shares.recall, "density": shares.density,
            "coverage": shares.coverage}  # fmt: skip


def _inception_score(_: View, fake: View) -> Score:
    assert fake.features.logits is not None
    return inception_score(fake.features.logits)


def _clip(_: View, fake: View) -> Score:
    assert fake.texts is not None
    return clip_score(fake.features.values, fake.texts)


def _diversity(_: View, fake: View) -> Score:
    return diversity(fake.features.values, fake.labels)


def _accuracy(_: View, fake: View) -> Score:
    assert fake.class_logits is not None
    assert fake.labels is not None
    return accuracy(fake.class_logits, fake.labels)


def _one(name: str, measure: Callable[[View, View], Score]) -> Callable[[View, View], Figures]:
    return lambda real, fake: {name: measure(real, fake)}


EVALUATORS: Mapping[str, Evaluator] = MappingProxyType(
    {
        "fd": Evaluator(_one("fd", _fd)),
        "fid": Evaluator(_one("fid", _fd), network=inception.NAME, elsewhere="fd"),
        "fd_infinity": Evaluator(
            _one("fd_infinity", lambda real, fake: fd_infinity(real.moments, fake.features.values))
        ),
        "kid": Evaluator(_one("kid", _kid)),
        "mmd": Evaluator(_one("mmd", _mmd)),
        "cmmd": Evaluator(_one("cmmd", _mmd), network=clip.PREFIX, elsewhere="mmd"),
        "pr": Evaluator(_pr, "higher", NEAREST + 1),
        "is": Evaluator(_one("is", _inception_score), "higher", 2 * SPLITS, "logits"),
        "clip": Evaluator(_one("clip", _clip), "higher", 3, "captions"),
        "diversity": Evaluator(_one("diversity", _diversity), "as real"),
        "lpips": Evaluator(_one("lpips", _diversity), "as real", network=lpips.NAME, elsewhere="diversity"),
        "accuracy": Evaluator(_one("accuracy", _accuracy), "higher", 3, "classes"),
    }
)
"""What `--metrics` takes. `fid`, `cmmd` and `lpips` are the names that `fd`, `mmd` and `diversity` have on the features
they were published with, and on no others."""


def evaluators(names: Sequence[str]) -> Mapping[str, Evaluator]:
    """Those of `names`, each once.

    Raises:
        UserError: there is no such name, or none is given.
    """
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"metrics: none is named {name!r}, allowed are {', '.join(EVALUATORS)}"
                            f"{did_you_mean(name, EVALUATORS)}")  # fmt: skip
    if not names:
        raise UserError(f"metrics: none given, allowed are {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name] for name in names}
