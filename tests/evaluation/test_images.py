"""Scores of images: they rise with the damage, and refuse to be compared where they must not be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.data.emoji import emoji32
from fewstep.data.samples import Samples
from fewstep.errors import UserError
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import Identity
from fewstep.evaluation.images import Reference, Scores, real_indices, reference, require_comparable, score_images

COUNT = 300


@pytest.fixture(scope="module")
def real() -> Reference:
    return reference(emoji32(), COUNT, 0, extractor("classifier"))


@pytest.fixture(scope="module")
def fresh() -> Samples:
    data = emoji32()
    batch = data.batch(real_indices(data, COUNT, seed=1))
    return Samples(batch.images, batch.labels)


def scored(images: Tensor, labels: Tensor | None, real: Reference) -> Scores:
    return score_images(images, labels, real, extractor("classifier"))


def ladder(fresh: Samples) -> list[Tensor]:
    noise = torch.randn(fresh.images.shape, generator=torch.Generator().manual_seed(0))
    return [fresh.images, fresh.images + 0.2 * noise, fresh.images + noise, noise]


def test_scores_rise_with_noise(real, fresh):
    scores = [scored(images, fresh.labels, real) for images in ladder(fresh)]
    fd = [score.fd.value for score in scores]
    kid = [score.kid.value for score in scores]
    right = [score.accuracy.value for score in scores if score.accuracy]
    assert fd[0] < 1.5 < 4 < fd[1] < 20 < fd[2] < fd[3]
    assert kid[0] < 0.02 < kid[1] < kid[2] < kid[3]
    assert right[0] > 0.98
    assert right[0] >= right[1] > right[2] > right[3] - 0.02
    assert right[3] < 0.15


def test_real_images_are_at_distance_zero_within_the_error(real, fresh):
    score = scored(fresh.images, fresh.labels, real).kid
    assert score.stderr is not None
    assert abs(score.value) < 3 * score.stderr


def test_faults_beside_noise_are_noticed(real, fresh):
    floor = scored(fresh.images, fresh.labels, real).fd.value
    soft = torch.nn.functional.avg_pool2d(fresh.images, 3, stride=1, padding=1, count_include_pad=False)
    light = fresh.images[:, 0, 0, 0] > 0
    few = fresh.images[:30].repeat(10, 1, 1, 1)
    for images in (soft, fresh.images[light], few):
        assert scored(images, None, real).fd.value > 3 * floor


def test_labels_of_other_images_score_at_chance(real, fresh):
    right = scored(fresh.images, (fresh.labels + 1) % 24, real).accuracy
    assert right is not None
    assert right.value < 0.02


def test_pixels_and_floats_score_alike(real, fresh):
    pixels = ((fresh.images + 1) * 127.5).round().to(torch.uint8)
    assert scored(pixels, fresh.labels, real) == scored(fresh.images, fresh.labels, real)


def test_the_order_of_the_images_does_not_matter(real, fresh):
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    one, other = scored(fresh.images, None, real), scored(fresh.images[order], None, real)
    assert one.fd.value == pytest.approx(other.fd.value, rel=1e-4)
    assert one.kid.value == pytest.approx(other.kid.value, abs=1e-6)


def test_a_result_as_plain_values(real, fresh):
    score = score_images(fresh.images[:100], None, real, extractor("classifier"), seconds_per_image=0.5)
    plain = score.as_json()
    assert plain["images"] == 100
    assert plain["real_images"] == COUNT
    assert plain["accuracy"] is None
    assert plain["seconds_per_image"] == 0.5
    assert plain["fd"] == score.fd.value
    assert plain["kid_stderr"] == score.kid.stderr
    assert str(plain["features"]).startswith("classifier@32 resize=none sha256:")


def test_results_of_other_counts_or_features_are_not_compared(real, fresh):
    score = scored(fresh.images, None, real)
    require_comparable(score, replace(score, seconds_per_image=1.0))
    for change in ({"images": 5}, {"real_images": 5}, {"features": "other"}):
        with pytest.raises(UserError, match="cannot be compared"):
            require_comparable(score, replace(score, **change))


def test_a_reference_of_other_features_is_refused(real, fresh):
    other = replace(real, features=Identity("classifier", "1" * 64, 32, "none"))
    with pytest.raises(UserError, match="reference: made with classifier@32 resize=none sha256:1111"):
        scored(fresh.images, None, other)


def test_a_data_set_of_other_classes_is_refused():
    class Two:
        shape, classes, length = (3, 32, 32), ("a", "b"), None

        def batch(self, indices):
            raise AssertionError

    with pytest.raises(UserError, match=r"trained on 24 classes .* the data set has 2 others"):
        reference(Two(), 10, 0, extractor("classifier"))


def test_real_samples_of_different_seeds_never_meet():
    data = emoji32()
    first, second = set(real_indices(data, 5000, 0)), set(real_indices(data, 5000, 1))
    assert len(first) == len(second) == 5000
    assert not first & second
    assert min(first | second) > 10**9  # training starts at 0


def test_a_finite_set_gives_each_of_its_samples_once():
    data = emoji32(length=50)
    assert sorted(real_indices(data, 50, 0)) == list(range(50))
    assert real_indices(data, 20, 1) != real_indices(data, 20, 2)
    with pytest.raises(UserError, match="found 50 images in the data set, 51 were asked for"):
        real_indices(data, 51, 0)
    with pytest.raises(UserError, match="2 images were asked for, at least 3"):
        real_indices(data, 2, 0)
