"""Inception score, CLIP score and diversity against torchmetrics and against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore

from fewstep.errors import UserError
from fewstep.evaluation.spread import clip_score, diversity, inception_score
from tests.evaluation.test_metrics import randn


class Given(nn.Module):
    """Hands logits through where an image network is expected."""

    num_features = 7

    def forward(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save:UserWarning")
@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_equals_torchmetrics(splits):
    logits = 2 * randn(100, 7)
    metric = InceptionScore(feature=Given(), splits=splits).set_dtype(torch.float64)
    # Theirs shuffles with the global stream and then cuts; ours takes every fifth. The same parts, where we shuffle so.
    torch.manual_seed(3)
    order = torch.randperm(100)
    shuffled = torch.empty_like(logits)
    shuffled[order] = logits.view(-1, splits, 7).transpose(0, 1).reshape(100, 7)
    torch.manual_seed(3)
    metric.update(shuffled)
    mean, deviation = metric.compute() if splits > 1 else (_quiet(metric), None)
    ours = inception_score(logits, splits)
    assert ours.value == pytest.approx(float(mean), rel=1e-6)
    if deviation is not None:
        assert ours.stderr == pytest.approx(float(deviation) / splits**0.5, rel=1e-6)
    else:
        assert ours.stderr is None


def _quiet(metric: Metric) -> Tensor:
    with pytest.warns(UserWarning, match="degrees of freedom"):
        return metric.compute()[0]


def test_inception_score_of_sure_and_unsure_logits():
    sure = 1000 * torch.eye(8).repeat(20, 1)
    assert inception_score(sure, splits=1).value == pytest.approx(8)  # one class an image, all classes alike
    assert inception_score(torch.zeros(40, 8)).value == pytest.approx(1)
    with pytest.raises(UserError, match="is: found 19 images, at least 20 are needed"):
        inception_score(torch.zeros(19, 8))


def test_clip_score_by_hand():
    images, texts = randn(6, 5), randn(6, 5, seed=1)
    cosines = [float(i @ t / (i.norm() * t.norm())) for i, t in zip(images, texts, strict=True)]
    assert min(cosines) < 0
    wanted = torch.tensor([100 * max(cosine, 0.0) for cosine in cosines], dtype=torch.float64)
    score = clip_score(images, texts)
    assert score.value == pytest.approx(float(wanted.mean()), rel=1e-9)
    assert score.stderr == pytest.approx(float(wanted.std()) / 6**0.5, rel=1e-9)
    with pytest.raises(UserError, match="clip: found 5 captions for 6 images"):
        clip_score(images, texts[:5])


def test_diversity_equals_all_pairs_within_a_condition():
    values, labels = randn(9, 4), torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 0])
    expected = []
    for label in (0, 1):  # class 2 has one image and no pair
        rows = [v for v, one in zip(values, labels, strict=True) if one == label]
        pairs = [float((a - b).square().sum()) for i, a in enumerate(rows) for b in rows[:i]]
        expected.append(sum(pairs) / len(pairs))
    assert diversity(values, labels).value == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_diversity_without_conditions_and_of_copies():
    values = randn(20, 4)
    assert diversity(values, None).value == pytest.approx(diversity(values, torch.zeros(20)).value)
    assert diversity(values[:1].repeat(5, 1), None).value == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match=r"diversity: found one image a condition \(3 in all\)"):
        diversity(values[:3], torch.arange(3))
