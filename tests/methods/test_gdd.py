"""GDD with a discriminator that is known, and on a student whose fixed point is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from fewstep.data.samples import Samples
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.errors import UserError
from fewstep.models.external_features import PACKAGE
from fewstep.models.load import load_denoiser
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.methods.gaussians import Gaussian, finish, state_of
from tests.tiny import alive, unet2d_classes
from tests.training.runs import begin, config, go, moved, sources, weights

TINY: dict[str, Any] = {"name": "gdd"}
UNIT = GaussianMixture.gaussian(0.0, 1.0)


class Optimal(nn.Module):
    """ln(p/q) at flow time 0.4 for data N(0, 1) and samples N(0.3, 0.8²), from E[x_0 | x_t] of the latter."""

    outputs = 1

    def forward(self, features: Sequence[Tensor], log_ratio: Tensor, labels: Tensor | None) -> Tensor:
        alpha, variance = 0.6, 0.6**2 * 0.8**2 + 0.4**2
        x_t = (features[0] - 0.3) * variance / (alpha * 0.8**2) + alpha * 0.3
        real, fake = torch.distributions.Normal(0.0, (0.6**2 + 0.4**2) ** 0.5), (alpha * 0.3, variance**0.5)
        return real.log_prob(x_t) - torch.distributions.Normal(*fake).log_prob(x_t)


@pytest.mark.parametrize(("loss", "expected"), [("non_saturating", (0.0941, -0.0754)), ("hinge", (0.2077, -0.1839))])
def test_the_gradient_under_the_best_discriminator(loss, expected):
    """h = 1/(1+r) times the difference of scores, and 1 times it: the values are exact up to the batch's noise."""
    student = Gaussian(1)
    with torch.no_grad():
        student.mean.fill_(0.3)
        student.log_std.fill_(0.8).log_()
    method = {**TINY, "adversarial_loss": loss, "judged_window": [0.4, 0.4001]}
    state = state_of(method, student, UNIT, UNIT, data={"batch_size": 400_000})
    object.__setattr__(state.method.judge, "heads", Optimal())  # pyright: ignore[reportAttributeAccessIssue]
    state.method.turn(1).loss(state.next_batch(), state.rng).total.backward()
    assert student.mean.grad is not None
    assert student.log_std.grad is not None
    assert float(student.mean.grad) == pytest.approx(expected[0], abs=2e-3)
    assert float(student.log_std.grad) / 0.8 == pytest.approx(expected[1], abs=2e-3)


@pytest.mark.parametrize("train_features", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_student_ends_at_the_data_s_moments(train_features):
    """Mean 1 and standard deviation 0.5, from 0 and 1."""
    student = Gaussian(1)
    data = GaussianMixture.gaussian(1.0, 0.5)
    method = {**TINY, "adversarial_loss": "relativistic", "r1_weight": 0.1, "r2_weight": 0.1}
    optim: dict[str, object] = {"lr": 2e-2, "betas": [0.0, 0.99], "decay": "cosine", "clip": None}
    method |= {"train_features": train_features}
    state = state_of(method, student, data, data, optim=optim, train={"steps": 700})
    finish(state)
    assert float(student.mean.detach()) == pytest.approx(1.0, abs=0.06)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.5, abs=0.05)


def test_whose_turn_it_is_decides_who_has_gradients():
    state = begin(config({**TINY, "r1_weight": 1.0, "r2_weight": 1.0}))
    others = {"discriminator", "features"}
    for step, alone in ((0, others), (1, {"student"})):
        turn = state.method.turn(step)
        assert set(turn.trains) == alone
        for name, player in state.method.players.items():
            player.require_grad(name in turn.trains or step == 0)  # in the judge's turn the loss alone routes them
        turn.loss(state.next_batch(), state.rng).total.backward()
        players = state.method.players.items()
        reached = {name for name, one in players if any(p.grad is not None for p in one.parameters.values())}
        assert reached == alone
        for _, player in players:
            for parameter in player.parameters.values():
                parameter.grad = None


def test_the_turns_and_what_moves():
    state = begin(config({**TINY, "discriminator_updates": 2}))
    before = weights(state)
    assert [report.turn for report in go(state, 2)] == ["discriminator", "discriminator"]
    assert moved(before, weights(state)) == {"discriminator", "features"}
    assert go(state, 1)[0].turn == "student"
    frozen = begin(config({**TINY, "train_features": False}))
    assert set(frozen.method.players) == {"student", "discriminator"}
    backbone = frozen.method.judge.backbone.network  # pyright: ignore[reportAttributeAccessIssue]
    first = {name: value.clone() for name, value in backbone.state_dict().items()}
    go(frozen)
    assert all(torch.equal(value, first[name]) for name, value in backbone.state_dict().items())


class Images:
    """The mixture's samples as images of one channel."""

    def __init__(self) -> None:
        self.mixture = sources().dataset
        self.shape, self.classes, self.length = (1, 8, 8), self.mixture.classes, None

    def batch(self, indices: Sequence[int]) -> Samples:
        vectors = self.mixture.batch(indices)
        return Samples(vectors.images.repeat(1, 32).reshape(-1, 1, 8, 8), vectors.labels)


def on_images(folder: Any, **method: object) -> TrainState:
    DDIMPipeline(alive(unet2d_classes(8, 5, 1)), DDIMScheduler()).save_pretrained(folder / "teacher")
    teacher = load_denoiser(str(folder / "teacher"))
    run = config({**TINY, **method}, folder / "run", data={"batch_size": 2}, train={"steps": 4})
    return begin(run, Sources(Images(), teacher, teacher.copy()))


def test_gdd_i_leaves_the_convolutions_as_they_were(tmp_path):
    state = on_images(tmp_path, train="innate", features="teacher")
    network = state.method.student.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    go(state)
    same = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    frozen = set(before) - set(state.method.players["student"].parameters)
    assert same >= frozen
    for part in (".conv1.", ".conv2.", ".conv.", ".to_out."):
        assert any(part in name for name in frozen), part
    trained = set(before) - frozen
    for part in ("conv_in", "conv_out", "class_embedding", "time_embedding", "norm", "to_q", "time_emb_proj"):
        assert any(part in name for name in trained), part
    assert not any(part in name for name in trained for part in (".conv1.", ".conv2.", ".conv.", "to_out"))
    count = sum(before[name].numel() for name in frozen) / sum(p.numel() for p in before.values())
    assert 0.5 < count < 0.95
    assert len(trained & same) < len(trained) / 10, "what trains has moved"


def test_gdd_i_on_vectors_freezes_the_residual_layers():
    state = begin(config({**TINY, "train": "innate"}))
    network = state.method.student.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    go(state)
    same = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if name.startswith("middle.")}


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE.replace("-", "_")) is None, reason=f"{PACKAGE} is not installed")
def test_an_external_judge_of_clean_pixels(tmp_path):
    method = {"features": "efficientnet-lite0", "feature_size": 32, "judged_window": [0.0, 0.01], "r1_weight": 1e-4}
    state = on_images(tmp_path, **method)
    judge, student = go(state, 2)
    assert set(judge.terms.losses) == {"discriminator", "r1"}
    assert float(judge.terms.losses["discriminator"]) == pytest.approx(2 * 0.6931, rel=0.3)
    assert float(student.gradient_norms["student"]) > 0
    assert len(state.method.judge.heads.heads) == 4  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"features": "teacher"}, r"feature taps need a network, this teacher is a closed form"),
        ({"features": "efficientnet-lite0"}, r"samples of shape \(2,\) given"),
        ({"adversarial_weight": 0.0}, r"method.adversarial_weight: 0 given; the adversary is all"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        begin(config({**TINY, **wrong}))
