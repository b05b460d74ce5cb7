"""Mixture files: what is read, and the line a mistake is told in."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.errors import UserError


def test_a_mixture_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"weights": [1, 3], "means": [[0, 1], [2, 3]], "stds": [0.5, 1], "labels": [0, 1]}))
    mixture = GaussianMixture.from_json(path)
    assert mixture.weights.tolist() == [0.25, 0.75]
    assert mixture.means.tolist() == [[0, 1], [2, 3]]
    assert mixture.stds.tolist() == [0.5, 1]
    assert mixture.labels is not None
    assert torch.equal(mixture.labels, torch.tensor([0, 1]))


@pytest.mark.parametrize("labels", [{}, {"labels": None}])
def test_bare_means_have_one_dimension_and_labels_may_be_left_out(tmp_path: Path, labels: dict[str, None]) -> None:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"weights": [1, 1], "means": [-1, 1], "stds": [0.5, 0.5]} | labels))
    mixture = GaussianMixture.from_json(str(path))
    assert mixture.means.tolist() == [[-1], [1]]
    assert mixture.labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "a list given, an object with the keys weights, means, stds, labels needed"),
        ('{"weights": [1], "means": [0], "std": [1]}', "std: unknown key, .*; did you mean 'stds'?"),
        ('{"weights": [1], "means": [0]}', "stds: missing"),
        ('{"weights": 1, "means": [0], "stds": [1]}', "weights: 1 given, a list needed"),
        ('{"weights": ["a"], "means": [0], "stds": [1]}', "weights: 'a' given, a number needed"),
        ('{"weights": [true], "means": [0], "stds": [1]}', "weights: True given, a number needed"),
        ('{"weights": [1, 1], "means": [[0], [1, 2]], "stds": [1, 1]}', "means: every mean needs the same number"),
        ('{"weights": [1, 1], "means": [[0]], "stds": [1, 1]}', "means: shape"),
        ('{"weights": [1, 1], "means": [0, 1], "stds": [1]}', "stds: shape"),
        ('{"weights": [1], "means": [[]], "stds": [1]}', "0 dimensions given, 1 to 16 allowed"),
        ('{"weights": [], "means": [], "stds": []}', "weights: "),
        ('{"weights": [1], "means": [0], "stds": [-1]}', "stds: .* positive numbers needed"),
        ('{"weights": [-1], "means": [0], "stds": [1]}', "weights: .* positive numbers needed"),
        ('{"weights": [NaN], "means": [0], "stds": [1]}', "weights: .* positive numbers needed"),
        ('{"weights": [1], "means": [0], "stds": [1], "labels": [0.5]}', "labels: 0.5 given, a whole number needed"),
        ('{"weights": [1], "means": [0], "stds": [1], "labels": [0, 1]}', "labels: "),
        ('{"weights": [1], "means": [0], "stds": [1], "labels": []}', "labels: "),
        ('{"weights": [1], "means": [0], "stds": [1], "labels": [1]}', "labels: classes"),
    ],
)
def test_mistakes_are_told_in_one_line_that_begins_with_the_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mixture.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        GaussianMixture.from_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        GaussianMixture.from_json(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.json: not a JSON file"):
        GaussianMixture.from_json(tmp_path / "binary.json")
