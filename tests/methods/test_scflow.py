"""Self-corrected flow distillation: discrete consistency both ways, and terms of two other families around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.neighbours import Neighbours
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP
from fewstep.diffusion.times import TimePair
from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial
from fewstep.methods.trajectory.scflow import SCFlow, SCFlowConfig
from fewstep.models.conditioning import Condition
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.method import Setup
from tests import tiny
from tests.methods.gaussians import state_of
from tests.training.runs import assert_same, begin, config, everything, go, moved, weights

PLAIN = {"name": "scflow", "backward_weight": 0.0, "reflow_weight": 0.0, "adversarial_weight": 0.0}
FULL = {"name": "scflow", "warmup": 0.3, "modulated": True}
RELATIVISTIC = Adversarial.RELATIVISTIC
MEAN, STD = 1.5, 0.4


class Drawn(Rng):
    """Uniform numbers and noise as told."""

    def __init__(self, uniforms: list[Tensor], noise: Tensor) -> None:
        super().__init__(0)
        self.uniforms, self.noise = list(uniforms), noise

    def uniform(self, batch: int) -> Tensor:
        return self.uniforms.pop(0)

    def normal(self, like: Tensor) -> Tensor:
        return self.noise


def test_with_its_extra_terms_off_it_is_discrete_consistency():
    """The same gradients as that method's, at the same pairs."""
    u, down, up = torch.rand(3, 8)
    noise = torch.randn(8, 2)
    times = Neighbours.within(0.1, u, down, up)
    ours = begin(config(PLAIN))
    base = {"name": "consistency", "solver": "euler", "huber_c": 1e-2, "target": "ema", "target_decay": 0.9}
    theirs = begin(config(base))
    theirs.method.pairs = lambda u: TimePair(times.t, times.cleaner)  # pyright: ignore[reportAttributeAccessIssue]
    batch = ours.next_batch()
    gradients = []
    for state, uniforms in ((ours, [u, down, up]), (theirs, [u])):
        state.method.players["student"].require_grad(True)
        terms = state.method.turn(0).loss(batch, Drawn(uniforms, noise))
        assert set(terms.losses) == {"consistency"}
        terms.total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in state.method.players["student"].parameters.values()]))  # pyright: ignore
    assert float(gradients[0].norm()) > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


class ExactMap(nn.Module):
    """The clean end of the flow through (x, t) of N(1.5, .4²): m + s/τ·(x − (1−t)·m); `bias` moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t = (timestep / 1000)[:, None]
        width = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        return (MEAN + STD / width * (sample - (1 - t) * MEAN) + self.bias,)


def exact(**settings: float):
    """A student that is the teacher's exact flow map, and a batch of data in float64."""
    data = GaussianMixture.gaussian(MEAN, STD)
    method = state_of({**PLAIN, **settings}, ExactMap(), data, data).method
    x = MEAN + STD * torch.randn(4096, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return method, Batch(x, Condition.none(), torch.arange(4096))


def residual(reach: float, **settings: float) -> dict[str, float]:
    method, batch = exact(reach=reach, huber_c=1e3, **settings)  # quadratic: d²/(2c)
    terms = method.loss(batch, Rng(0))  # pyright: ignore[reportAttributeAccessIssue]
    return {name: 2e3 * float(loss.detach()) for name, loss in terms.losses.items()}


def test_the_exact_map_leaves_what_euler_s_step_does():
    """Each step errs in second order, so the squared residuals of both directions fall with the fourth power."""
    coarse, fine = (residual(reach, backward_weight=1.0) for reach in (0.02, 0.01))
    for name in ("consistency", "backward"):
        assert fine[name] < 1e-6
        assert coarse[name] / fine[name] == pytest.approx(16, rel=0.25)


def test_truncation_biases_the_exact_map():
    """There the target is the data, which no map of x_t can know: what is left is E[(f − x_0)²] of those times."""
    assert residual(0.01)["consistency"] < 1e-6
    found = residual(0.01, truncation=0.4)["consistency"]
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    # f − x_0 at x_t = (1−t)·x_0 + t·ε: (s/τ·(1−t) − 1)·(x_0 − m) + s/τ·t·ε
    gain = STD / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    error = ((gain * (1 - t) - 1) * STD) ** 2 + (gain * t) ** 2
    assert found == pytest.approx(float((error * (t < 0.405)).mean()), rel=0.1)


@pytest.mark.parametrize(("settings", "term"), [({}, "consistency"), ({"backward_weight": 1.0}, "backward")])
def test_a_map_that_says_too_much_of_t_is_told_to_say_less(settings, term):
    """Student biased by .3, its target not: the gradient of √(d² + c²) in the bias is near +1."""
    method, batch = exact(**settings)
    with torch.no_grad():
        method.student.network.bias.fill_(0.3)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    terms = method.loss(batch, Rng(0)).losses  # pyright: ignore[reportAttributeAccessIssue]
    (slope,) = torch.autograd.grad(terms[term], method.student.network.bias)  # pyright: ignore
    assert float(slope) == pytest.approx(1.0, abs=0.02)


def test_the_correction_is_zero_where_the_line_from_the_noise_leads_to_its_own_sample():
    """With bias b at t = 1 alone, ŷ = y + b; a map that says ŷ all along the line pays nothing, the exact one pays."""

    class Line(ExactMap):
        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
            t = (timestep / 1000)[:, None]
            # On x = (1−t)·ŷ + t·ε with ŷ = m + s·ε: ε = (x − (1−t)·m)/((1−t)·s + t).
            return (MEAN + STD * (sample - (1 - t) * MEAN) / ((1 - t) * STD + t) + self.bias,)

    data = GaussianMixture.gaussian(MEAN, STD)
    _, batch = exact()
    for network, zero in ((Line(), True), (ExactMap(), False)):
        method = state_of({**PLAIN, "reflow_weight": 1.0}, network, data, data).method
        paid = float(method.warm_up_loss(batch, Rng(0)).losses["reflow"].detach())  # pyright: ignore
        assert (paid < 1e-9) is zero


def test_neighbours_stay_within_reach_and_within_the_path():
    u, down, up = torch.rand(3, 10_000, generator=torch.Generator().manual_seed(0))
    times = Neighbours.within(0.1, u, down, up)
    for far in (times.t - times.cleaner, times.noisier - times.t):
        assert float(far.min()) >= 0
        assert float(far.max()) <= 0.1 + 1e-6
        middle = far[(u > 0.1) & (u < 0.9)]
        assert float(middle.mean()) == pytest.approx(0.05, abs=1e-3)
    assert float(times.cleaner.min()) >= 0
    assert float(times.noisier.max()) <= 1
    with pytest.raises(UserError, match=r"reach: 0.0 given, a positive number needed"):
        Neighbours.within(0.0, u, down, up)


def test_turns_terms_and_whom_they_move():
    state = begin(config(FULL, train={"steps": 10}))
    expected = ["warm-up"] * 3 + ["discriminator", "student"] * 3
    names, seen = {"warm-up": {"student"}, "discriminator": {"discriminator"}, "student": {"student"}}, []
    for turn in expected:
        before = weights(state)
        (report,) = go(state, 1)
        seen.append(report.turn)
        assert moved(before, weights(state)) == names[turn]
        if turn == "student":
            assert set(report.terms.losses) == {"consistency", "backward", "reflow", "adversarial"}
        if turn == "warm-up":
            assert set(report.terms.losses) == {"consistency", "reflow"}
    assert seen == expected


def test_indifferent_heads_pay_the_chance_level():
    state = begin(config({**FULL, "warmup": 0.0}))
    for parameter in state.method.players["discriminator"].parameters.values():
        parameter.data.zero_()
    batch = state.next_batch()
    judged = state.method.turn(0).loss(batch, state.rng)
    student = state.method.turn(1).loss(batch, state.rng)
    assert judged.losses["discriminator"].tolist() == pytest.approx(2 * math.log(2))
    assert student.losses["adversarial"].tolist() == pytest.approx(0.1 * math.log(2))


def test_it_trains_a_network_of_another_process():
    """A guided VP network as teacher, seen on the flow path; heads on every block of it, told noise and class."""
    process = VP(torch.linspace(0.9999, 0.003, 1000, dtype=torch.float64))
    teacher = make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(process, Kind.V))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, Condition.of_labels(torch.arange(4)), torch.arange(4))
    setup = Setup(teacher.copy(), teacher, Guided(teacher, teacher.null, 2.0), 1, 10, batch)
    made = SCFlowConfig(name="scflow", warmup=0.0, taps=("blocks",), modulated=True, adversarial_loss=RELATIVISTIC)
    method = SCFlow(made, setup)
    assert method.judge is not None
    assert method.judge.backbone.network is teacher.network
    for step in (0, 1):
        turn = method.turn(step)
        for name, player in method.players.items():
            player.require_grad(name in turn.trains)
        terms = turn.loss(batch, Rng(0))
        assert terms.total.isfinite()
        terms.total.backward()
        for name, player in method.players.items():
            reached = [p.grad for p in player.parameters.values() if p.grad is not None]
            assert bool(reached) is (name in turn.trains)
            assert all(bool(g.isfinite().all()) for g in reached)
            for parameter in player.parameters.values():
                parameter.grad = None
        assert not any(p.grad is not None for p in teacher.network.parameters())
    for sampling, kind in (("euler", "ddim"), ("renoise", "renoise")):
        sampler = method.sampler(made.model_copy(update={"sampling": sampling}), process, 4)
        assert (sampler.times, sampler.kind) == ((999.0, 749.0, 499.0, 249.0), kind)


def test_stopped_and_resumed_is_bit_identical(tmp_path):
    run = config({**FULL, "backbone": "trained"}, tmp_path)
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, 4)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))
