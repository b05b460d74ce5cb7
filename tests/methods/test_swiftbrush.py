"""SwiftBrush on Gaussians: its gradient, its target under guidance, and the base shared by three networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.methods.gaussians import Gaussian, denoiser, finish, state_of
from tests.methods.quadrature import Quadrature
from tests.training.runs import begin, config, go, moved, sources, vector_denoiser, weights

OPTIM: dict[str, object] = {"lr": 3e-2, "betas": [0.0, 0.999], "decay": "cosine", "clip": None}
TINY: dict[str, object] = {"name": "swiftbrush", "fake_score_lora": None}
LORA: dict[str, object] = {"name": "swiftbrush", "fake_score_lora": 2}


def test_the_gradient_is_that_of_two_gaussians():
    """σ²·(ε̂_real − ε̂_fake) = α·σ·(x̂_0,fake − x̂_0,real): .6·.4/3 times the closed form, a sum over three dimensions."""
    student = Gaussian(3)
    with torch.no_grad():
        student.mean.copy_(torch.tensor([-0.3, 0.4, 2.0]))
        student.log_std.fill_(0.6).log_()
    teacher = GaussianMixture.gaussian(torch.tensor([1.0, -2.0, 0.5]), 1.3)
    method = {**TINY, "renoise": [0.39, 0.41], "anneal": 0.0}
    state = state_of(method, student, teacher, teacher, data={"batch_size": 4})
    state.method.turn(1).loss(state.next_batch(), Quadrature()).total.backward()
    assert student.mean.grad is not None
    assert student.log_std.grad is not None
    assert student.mean.grad.tolist() == pytest.approx([0.08 * g for g in (-0.2707, 0.4997, 0.3123)], abs=1e-5)
    assert float(student.log_std.grad.sum()) / 0.6 == pytest.approx(0.08 * -0.6197, abs=1e-5)


def test_at_one_noise_level_it_is_dmd2_without_its_normaliser():
    """Times α·σ = .6·.4; both draw the same numbers."""
    window = {"renoise": [0.399999, 0.400001], "anneal": 0.0}
    gradients = []
    for method in ({**TINY, **window}, {"name": "dmd2", "critic_updates": 1, "weight": "none", **window}):
        state = begin(config(method))
        go(state, 1)
        state.method.players["fake_score"].require_grad(False)
        state.method.players["student"].require_grad(True)
        state.method.turn(1).loss(state.next_batch(), state.rng).total.backward()
        gradients.append([p.grad for p in state.method.players["student"].parameters.values() if p.grad is not None])
    assert sum(float(g.abs().sum()) for g in gradients[1]) > 0.01
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, 0.24 * theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "rounds", [pytest.param(250, id="quick"), pytest.param(3000, id="full", marks=pytest.mark.slow)]
)
def test_the_student_ends_at_the_teacher_s_moments(rounds):
    """Mean (1, −1, .5, 2) and variances (2, 1, .5, .1), with a learned fake score."""
    wanted = Gaussian(4)
    with torch.no_grad():
        wanted.mean.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0]))
        wanted.log_std.copy_(0.5 * torch.tensor([2.0, 1.0, 0.5, 0.1]).log())
    teacher = Gaussian(4, steps=())
    teacher.load_state_dict(wanted.state_dict())
    student = Gaussian(4)
    data = GaussianMixture.gaussian(torch.zeros(4), 1.0)
    method = {**TINY, "fake_score_updates": 5}
    state = state_of(method, student, denoiser(teacher), data, optim=OPTIM, train={"steps": 6 * rounds})
    finish(state)
    assert float((student.mean - wanted.mean).detach().abs().max()) < 0.05
    variance, target = ((2 * one.log_std.detach()).exp() for one in (student, wanted))
    assert float((variance - target).norm() / target.norm()) < 0.05


class Family(nn.Module):
    """x | c ~ N(p·c, b²) for the classes c = −1 and 1, and the linear denoiser of N(0, u²) for the null label 2."""

    def __init__(self, p: float, b: float, u: float, student: bool) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.log_b, self.log_u = (nn.Parameter(torch.tensor(std).log()) for std in (b, u))
        self.student = student

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        t, labels = (timestep / 1000)[:, None], class_labels[:, None]
        mean = self.p * torch.where(labels == 2, 0, 2 * labels - 1)
        std = torch.where(labels == 2, self.log_u, self.log_b).exp()
        posterior = mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (sample - (1 - t) * mean)
        return (torch.where((t == 1) & self.student, mean + std * sample, posterior),)


CLASSES = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.5), torch.tensor([0, 1]))


def family_run(student: Family, guidance: float, steps: int, **method: object) -> TrainState:
    """A run from `student` with the family of p = 1, b² = .25, u² = 1.25 as the teacher."""
    null = Condition.of_labels(torch.tensor([2]))
    teacher = replace(denoiser(Family(1.0, 0.5, 1.25**0.5, student=False)), null=null)
    told: dict[str, object] = {**TINY, **method}
    return state_of(
        told, student, teacher, CLASSES, optim=OPTIM, teacher={"guidance": guidance}, train={"steps": steps}
    )


@pytest.mark.slow
@pytest.mark.parametrize("guidance_range", [None, [0.5, 4.0]])
def test_equal_guidance_of_both_scores_ends_at_the_unguided_teacher(guidance_range):
    """Every scale has the same fixed point: it only weighs the gradient."""
    student = Family(0.5, 0.8, 0.9, student=True)
    guidance = 2.5 if guidance_range is None else 1.0
    state = family_run(student, guidance, 1200, guidance_range=guidance_range, fake_score_updates=3, null_share=0.3)
    finish(state)
    assert float(student.p.detach()) == pytest.approx(1.0, abs=0.04)
    assert float((2 * student.log_b.detach()).exp()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("guidance_range", [None, [0.5, 2.5]])
@pytest.mark.slow
def test_guidance_of_the_teacher_alone_ends_beyond_it(guidance_range):
    """At one noise level, scale s = 1.5 or 1.5 on average, where the guided teacher says s·ρ·c + K·x_t.

    With K = s·k_b + (1 − s)·k_u of the gains k_v = α·v²/(α²v² + σ²), and ρ = 1 − α·k_b, the student has
    p = s·ρ/(1 − α·K) and b² = K·σ²/(α·(1 − α·K)).
    """
    alpha, sigma, s = 0.6, 0.4, 1.5
    k_b, k_u = (alpha * v / (alpha**2 * v + sigma**2) for v in (0.25, 1.25))
    gain = s * k_b + (1 - s) * k_u
    p, variance = s * (1 - alpha * k_b) / (1 - alpha * gain), gain * sigma**2 / (alpha * (1 - alpha * gain))
    assert (p, variance) == pytest.approx((1.158, 0.0918), abs=1e-3)
    student = Family(0.5, 0.8, 0.9, student=True)
    method = {"guidance_range": guidance_range, "guide_fake": False, "fake_score_updates": 3}
    method |= {"renoise": [0.399, 0.401], "anneal": 0.0}
    finish(family_run(student, s if guidance_range is None else 1.0, 1200, **method))
    assert float(student.p.detach()) == pytest.approx(p, abs=0.03)
    assert float((2 * student.log_b.detach()).exp()) == pytest.approx(variance, abs=0.015)


def gap_of_equals(guidance_range: list[float], *, guide_fake: bool) -> float:
    """Mean |x̂_0,fake − x̂_0,real| of a student's turn whose fake score is the teacher itself."""
    null = Condition.of_labels(torch.tensor([2]))
    teacher = replace(denoiser(Family(1.0, 0.5, 1.25**0.5, student=True)), null=null)
    method: dict[str, object] = {**TINY, "guide_fake": guide_fake, "guidance_range": guidance_range}
    state = state_of(method, Family(1.0, 0.5, 1.25**0.5, student=True), teacher, CLASSES)
    return float(state.method.turn(1).loss(state.next_batch(), state.rng).figures["score_gap"])


def test_scales_drawn_for_a_sample_are_the_same_for_both_scores():
    """Then a fake score that is the teacher leaves nothing; unguided it leaves (s − 1)·|x̂_0,c − x̂_0,∅|."""
    assert gap_of_equals([0.5, 8.0], guide_fake=True) < 1e-6
    at_2, at_4 = (gap_of_equals([s, s + 1e-5], guide_fake=False) for s in (2.0, 4.0))
    assert at_2 > 0.1
    assert at_4 / at_2 == pytest.approx(3.0, rel=1e-3)
    # The drawn scales are uniform in the range: over 256 samples a mean of 3 − 1, against 1.
    assert gap_of_equals([2.0, 4.0], guide_fake=False) / at_2 == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(("guidance", "learns"), [(1.0, False), (2.0, True)])
def test_the_unconditional_output_is_learnt_where_guidance_asks_for_it(guidance, learns):
    state = family_run(Family(1.0, 0.5, 1.0, student=True), guidance, 2)
    before = weights(state)["fake_score/log_u"]
    go(state, 1)
    assert torch.equal(weights(state)["fake_score/log_u"], before) != learns


def shared(seed: int = 0) -> tuple[Sources, NetworkDenoiser]:
    """Teacher and student on the weights of one network."""
    teacher = vector_denoiser(seed)
    return replace(sources(), teacher=teacher, student=teacher.lora_view("student", 2)), teacher


@torch.no_grad()
def said(view: NetworkDenoiser) -> Tensor:
    """What it predicts at five fixed points."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    return view(x, torch.linspace(0.1, 1.0, 5), Condition.of_labels(torch.arange(5))).value


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_base_serves_three_and_never_changes(guidance):
    start, teacher = shared()
    before = said(teacher)
    base = {name: p.detach().clone() for name, p in teacher.network.named_parameters() if "lora_" not in name}
    state = begin(config(LORA, teacher={"guidance": guidance}), start)
    assert state.method.fake_score.network is state.method.student.network is teacher.network  # pyright: ignore[reportAttributeAccessIssue]
    first = weights(state)
    go(state, 6)
    assert torch.equal(said(teacher), before)
    now = {name.replace(".base_layer", ""): p for name, p in teacher.network.named_parameters() if "lora_" not in name}
    assert {name.replace(".base_layer", "") for name in base} == set(now)
    assert all(torch.equal(now[name.replace(".base_layer", "")], value) for name, value in base.items())
    after = weights(state)
    assert moved(first, after) == {"student", "fake_score"}
    # Every matrix of both adapters: none lost its gradient when another became active.
    assert [name for name in first if torch.equal(first[name], after[name])] == []
    assert float((said(state.method.student) - before).abs().max()) > 1e-3
    assert float((said(state.method.fake_score) - said(state.method.student)).abs().max()) > 1e-3  # pyright: ignore[reportAttributeAccessIssue]


def test_only_the_turn_s_adapter_gets_a_gradient():
    start, teacher = shared()
    state = begin(config(LORA), start)
    go(state, 2)  # past the first turns, at which half of an adapter's matrices have no gradient
    for step, trains in ((2, "fake_score"), (3, "student")):
        for name, player in state.method.players.items():
            player.require_grad(name == trains)
        state.method.turn(step).loss(state.next_batch(), state.rng).total.backward()
        with_gradient = {name for name, p in teacher.network.named_parameters() if p.grad is not None}
        assert with_gradient == set(state.method.players[trains].parameters)
        teacher.network.zero_grad(set_to_none=True)


def test_both_branches_of_guidance_go_in_one_batch():
    start, teacher = shared()
    state = begin(config({**LORA, "guidance_range": [1.0, 3.0]}), start)
    sizes: list[int] = []
    teacher.network.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["sample"])), with_kwargs=True
    )
    state.method.turn(1).loss(state.next_batch(), state.rng)
    assert sizes == [8, 16, 16]


def test_no_image_is_read():
    totals = []
    for scale in (1.0, float("nan")):
        state = begin(config(TINY))
        batches = [state.next_batch() for _ in range(2)]
        losses = [
            state.method.turn(step).loss(replace(batch, x=scale * batch.x), state.rng)
            for step, batch in enumerate(batches)
        ]
        totals.append([float(terms.total.detach()) for terms in losses])
    assert totals[0] == totals[1]
    assert all(map(bool, totals[0]))


def test_mistakes_are_told_before_the_first_step():
    with pytest.raises(UserError, match="adapters and feature taps need a network, this teacher is a closed form"):
        begin(config(LORA))
    unconditional = replace(sources(), teacher=GaussianMixture.gaussian(torch.zeros(2), 1.0).denoiser(Flow()))
    with pytest.raises(UserError, match=r"method.guidance_range: guidance comes from a conditional teacher"):
        begin(config({**TINY, "guidance_range": [1.0, 2.0]}), unconditional)
    with pytest.raises(UserError, match=r"null_share: 0.2 given; it does nothing without guide_fake"):
        config({**TINY, "guide_fake": False, "null_share": 0.2})


def test_the_sampler_is_the_rollout_s():
    state = begin(config(TINY, student={"steps": 4}))
    sampler = state.method.sampler(state.config.method, Flow(3.0), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.9, 0.75, 0.5), "renoise")
    assert state.method.times == (1.0, 0.75, 0.5, 0.25)  # pyright: ignore[reportAttributeAccessIssue]
