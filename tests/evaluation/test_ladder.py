"""The sanity ladder: fresh real images, the teacher's, the teacher's with noise, nothing but noise, in this order.

What has no place on it: the diversity figures, which are best where they equal those of real images, and the Inception
score of real images, whose classes are drawn while the teacher's come one after the other, so that it may be lower.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fewstep.commands.generate import sample_noise
from fewstep.data.emoji import emoji32
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.evaluation.evaluators import EVALUATORS, Figures
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import to_uint8
from fewstep.evaluation.images import floor_of, reference
from fewstep.evaluation.panel import Panel
from fewstep.models.conditioning import Condition
from fewstep.models.efficientnet import PACKAGE
from fewstep.models.load import load_denoiser

DISTANCES = ("fd", "kid", "mmd")
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE.replace("-", "_")) is None, reason=f"{PACKAGE} is not installed"
)


def taught(count: int, steps: int) -> torch.Tensor:
    """What the embedded teacher makes."""
    teacher, condition = load_denoiser("emoji32"), Condition.of_labels(torch.arange(count) % 24)
    noise = sample_noise((3, 32, 32), range(count), seed=0, step=0)
    with torch.no_grad():
        return sample(teacher, Sampler.of(teacher.process, steps, "ddim"), noise, condition, torch.Generator())


@pytest.fixture(scope="module")
def few() -> torch.Tensor:
    return taught(48, 6)


def climb(network: str, metrics: tuple[str, ...], images: torch.Tensor) -> list[Figures]:
    data, count = emoji32(), len(images)
    panel = Panel.of(data, extractor(network), metrics, count)
    real = reference(data, count, 0, panel.extractor, panel=panel, floor=True)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    made = [to_uint8(one) for one in (images, images + 0.5 * noise, noise)]
    labels = torch.arange(count) % 24
    return [floor_of(panel, real), *(panel.score(real.view, panel.look(images, labels)) for images in made)]


def rungs(figures: list[Figures], name: str) -> list[float]:
    return [one[name].value for one in figures]


@pytest.mark.slow
@needs_lite0
def test_every_distance_on_general_features(few):
    figures = climb("efficientnet-lite0", DISTANCES, few)
    for name in DISTANCES:
        real, teacher, noised, noise = rungs(figures, name)
        assert real < teacher < noised < noise, name


@pytest.mark.slow
@needs_lite0
def test_every_share_on_general_features():
    """With 96 images, as precision trusts real images that stand alone, whose neighbourhoods are wide."""
    figures = climb("efficientnet-lite0", ("pr", "is"), taught(96, 8))
    for name in ("precision", "density", "coverage"):
        real, teacher, noised, noise = rungs(figures, name)
        assert real > teacher > noised > noise, name
    real, teacher, noised, noise = rungs(figures, "recall")
    assert real >= teacher > noised >= noise
    _, teacher, noised, noise = rungs(figures, "is")
    assert teacher > noised > noise


def test_every_distance_and_accuracy_on_the_classifier(few):
    figures = climb("classifier", (*DISTANCES, "accuracy"), few)
    for name in DISTANCES:
        real, teacher, noised, noise = rungs(figures, name)
        assert real < teacher < noised < noise, name
    real, teacher, noised, noise = rungs(figures, "accuracy")
    assert real >= teacher > noised > noise


def test_the_direction_of_every_figure_is_stated():
    stated = {name: one.better for name, one in EVALUATORS.items()}
    assert {stated[name] for name in (*DISTANCES, "fid", "cmmd", "fd_infinity")} == {"lower"}
    assert {stated[name] for name in ("pr", "is", "clip", "accuracy")} == {"higher"}
    assert {stated[name] for name in ("diversity", "lpips")} == {"as real"}
