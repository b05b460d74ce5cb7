"""The digits of scikit-learn."""

from __future__ import annotations

import sys

import pytest
import torch

from fewstep.data.digits import Digits
from fewstep.errors import UserError


def test_counts_range_and_labels():
    train, held_out = Digits(), Digits("held_out")
    assert (len(train), len(held_out)) == (1618, 179)
    batch = train.batch(range(1618))
    assert batch.images.shape == (1618, 1, 8, 8)
    assert (batch.images.min(), batch.images.max()) == (-1.0, 1.0)
    assert torch.unique(batch.images).numel() == 17
    assert batch.labels is not None
    held_labels = held_out.batch(range(179)).labels
    assert held_labels is not None
    counts = torch.bincount(torch.cat([batch.labels, held_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert train.classes == tuple("0123456789")


def test_the_splits_are_the_whole_without_overlap():
    from sklearn.datasets import load_digits

    flat, _ = load_digits(return_X_y=True)
    images = torch.tensor(flat).float().view(-1, 8, 8) / 8 - 1
    assert torch.equal(Digits().batch([0, 8, 9]).images[:, 0], images[[0, 8, 10]])
    assert torch.equal(Digits("held_out").batch([0, 178]).images[:, 0], images[[9, 1789]])


def test_wrong_asks_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"digits split: found 'tran'.*did you mean 'train'"):
        Digits("tran")
    for index in (1618, -1):
        with pytest.raises(IndexError):
            Digits().batch([index])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"digits needs scikit-learn; install fewstep\[data\]"):
        Digits()
