"""Which figures go with which networks and data, what is refused, and the figures of real images among themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fewstep.data.emoji import emoji32
from fewstep.data.samples import Samples
from fewstep.errors import UserError
from fewstep.evaluation.classifier import shipped_classifier
from fewstep.evaluation.evaluators import View, evaluators
from fewstep.evaluation.features import Features, Identity
from fewstep.evaluation.images import floor_of, reference, require_same_terms, scored
from fewstep.evaluation.panel import Panel


class Pixels:
    """Features that are means of pixels, under any name."""

    classes = None
    device = torch.device("cpu")

    def __init__(self, name: str = "pixels", logits: bool = False, reads: bool = False):
        self.identity = Identity(name, "0" * 64, 32, "none")
        self.gives_logits = logits
        self.text: Callable[..., Tensor] | None = (lambda captions: torch.ones(len(captions), 3)) if reads else None

    def __call__(self, images: Tensor) -> Features:
        values = images.float().mean(dim=(2, 3))
        return Features(values, values if self.gives_logits else None)


class Plain:
    """A set of 30 flat images, of two classes or of none."""

    shape, length = (3, 8, 8), 30

    def __init__(self, classes: tuple[str, ...] = ()):
        self.classes = classes

    def batch(self, indices):
        levels = torch.tensor([(37 * i % 100) / 50 - 1 for i in indices]).view(-1, 1, 1, 1)
        labels = torch.tensor([i % 2 for i in indices]) if self.classes else None
        return Samples(levels.expand(-1, 3, 8, 8), labels)


class Refusal(NamedTuple):
    """A wish that cannot be granted, and what is said of it."""

    metrics: tuple[str, ...]
    network: Pixels
    said: str
    images: int = 30
    labelled: bool = True


REFUSALS = [
    Refusal(("fdd",), Pixels(), "metrics: none is named 'fdd', allowed are fd, fid, fd_infinity, kid, mmd, cmmd, pr, "
            "is, clip, diversity, lpips, accuracy; did you mean 'fd'?"),
    Refusal(("",), Pixels(), "metrics: none is named '', allowed are fd"),
    Refusal((), Pixels(), "metrics: none given"),
    Refusal(("fid",), Pixels(), "fid is kept for the features 'inception', found 'pixels'; on these it is called fd"),
    Refusal(("cmmd",), Pixels("dinov2"), "kept for the features 'clip', found 'dinov2'; on these it is called mmd"),
    Refusal(("lpips",), Pixels(), "kept for the features 'lpips', found 'pixels'; on these it is called diversity"),
    Refusal(("is",), Pixels(), "is needs logits, the features 'pixels' give none; classifier, efficientnet-lite0"),
    Refusal(("clip",), Pixels(), "clip needs features that read captions (clip:ARCH:TAG_OR_PATH), found 'pixels'"),
    Refusal(("clip",), Pixels(reads=True), "metrics: clip needs classes", labelled=False),
    Refusal(("accuracy",), Pixels(), "accuracy needs classes, and the source takes or the reference names none",
            labelled=False),
    Refusal(("accuracy",), Pixels(), "accuracy needs a classifier of the reference's 2 classes; the shipped one"),
    Refusal(("pr",), Pixels(), "metrics: pr needs at least 6 images on each side, 5 were asked for", 5),
    Refusal(("is",), Pixels(logits=True), "metrics: is needs at least 20 images on each side, 19 were asked for", 19),
    Refusal(("diversity",), Pixels(), "diversity needs two images of a class, more than 2 images for 2 classes", 2),
    Refusal(("fd_infinity",), Pixels(), "--fd-infinity: 12 images are needed for 3 features (four each), 11 were", 11),
]  # fmt: skip


@pytest.mark.parametrize("one", REFUSALS, ids=lambda one: f"{','.join(one.metrics)} {one.said[-20:]}")
def test_what_does_not_fit_is_refused_in_one_line(one):
    with pytest.raises(UserError) as caught:
        Panel.of(Plain(("dark", "light")), one.network, one.metrics, one.images, one.labelled)
    assert one.said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "published", "own"),
    [("inception", "fid", "fd"), ("clip:X", "cmmd", "mmd"), ("lpips", "lpips", "diversity")],
)
def test_a_published_name_is_the_same_figure_on_the_published_features(name, published, own):
    panel = Panel.of(Plain(("dark", "light")), Pixels(name), (published, own), 20)
    real = reference(Plain(("dark", "light")), 20, 0, panel.extractor, panel=panel)
    figures = panel.score(real.view, real.view)
    assert figures[published] == figures[own]


def test_accuracy_beside_other_features_is_the_classifier_s():
    data = emoji32()
    panel = Panel.of(data, Pixels(), ("fd", "accuracy"), 40)
    assert panel.classifier is not None
    real = reference(data, 40, 0, panel.extractor, panel=panel, floor=True)
    floor = floor_of(panel, real)
    assert floor["accuracy"].value > 0.95
    scores = scored(panel, real.view, real, floor)
    assert scores.features.startswith("pixels@32")
    assert scores.classifier == str(shipped_classifier().identity)
    assert scores.as_json()["floor"]["fd"] == floor["fd"].value
    assert scores.fd.value == pytest.approx(0, abs=1e-6)


def test_figures_left_out_are_fd_kid_and_accuracy_where_it_can_be():
    assert list(Panel.of(emoji32(), Pixels(), None, 9).evaluators) == ["fd", "kid", "accuracy"]
    assert list(Panel.of(emoji32(), Pixels(), None, 9, labelled=False).evaluators) == ["fd", "kid"]
    assert list(Panel.of(Plain(("dark", "light")), Pixels(), None, 9).evaluators) == ["fd", "kid"]
    assert list(Panel.of(Plain(), Pixels(), None, 20, more=("fd_infinity",)).evaluators) == ["fd", "kid", "fd_infinity"]
    assert list(evaluators(("kid", "fd", "kid"))) == ["kid", "fd"]


@pytest.mark.parametrize(("count", "others"), [(10, 10), (15, 15), (22, 8)])
def test_the_floor_of_a_finite_set_uses_what_is_left(count, others):
    data, network = Plain(("dark", "light")), Pixels()
    panel = Panel.of(data, network, ("fd", "kid"), count)
    real = reference(data, count, 0, network, panel=panel, floor=True)
    assert real.floor is not None
    assert (len(real.view), len(real.floor)) == (count, others)
    both = torch.cat([real.view.features.values, real.floor.features.values])
    assert len(both.unique(dim=0)) == count + others  # no image on both sides
    scores = scored(panel, real.view, real, floor_of(panel, real))
    assert scores.floor_images == others
    assert scores.floor["fd"].value > 0


@pytest.mark.parametrize(("metrics", "count"), [(("fd", "kid"), 28), (("fd", "fd_infinity"), 20), (("fd",), 30)])
def test_without_enough_others_there_is_no_floor(metrics, count):
    data, network = Plain(), Pixels()
    panel = Panel.of(data, network, metrics, count)
    real = reference(data, count, 0, network, panel=panel, floor=True)
    assert floor_of(panel, real) == {}
    scores = scored(panel, real.view, real, {})
    assert scores.as_json()["floor"] == {}
    assert scores.floor_images == 0


@pytest.mark.parametrize(
    "name", ["features", "images", "real_images", "reference_sha256", "floor_images", "classifier"]
)
def test_results_on_other_terms_are_not_compared(name):
    network = Pixels()
    panel = Panel.of(Plain(), network, ("fd",), 10)
    real = reference(Plain(), 10, 0, network, panel=panel, floor=True)
    plain = scored(panel, real.view, real, floor_of(panel, real)).as_json()
    require_same_terms(plain, {**plain, "seconds_per_image": 3.0, "fd": 5.0})
    with pytest.raises(UserError, match=f"scores: {name} is .* here and other there, these results cannot be compared"):
        require_same_terms(plain, {**plain, name: "other"})


def test_views_join_and_cut():
    view = View(
        Features(torch.arange(6).view(3, 2), torch.ones(3, 2)), torch.zeros(3, 4), torch.arange(3), torch.ones(3, 5)
    )
    whole = View.joined([view.first(2), view])
    assert whole.features.values.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]
    assert whole.labels is not None
    assert whole.labels.tolist() == [0, 1, 0, 1, 2]
    for one in (whole.features.logits, whole.class_logits, whole.texts):
        assert one is not None
        assert len(one) == 5
    assert View.joined([View(Features(torch.zeros(2, 1)))]).labels is None
