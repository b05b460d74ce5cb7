"""Guidance: one pass for both, none where it is off; scales, intervals and references of every kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.diffusion.gaussian import GaussianMixture, five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, Flow
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.rng import Rng
from fewstep.training.assemble import guided_teacher
from fewstep.training.loop import train
from fewstep.training.opening import Sources
from tests.tiny import alive, unet2d, unet2d_classes
from tests.training.runs import METHODS, begin, config, go, sources

T = torch.tensor([0.2, 0.5, 0.9])


@pytest.fixture
def denoiser() -> NetworkDenoiser:
    return make_denoiser(alive(unet2d_classes(8, 4)), Schedule(Flow(), Kind.VELOCITY))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8)


CONDITION = Condition.of_labels(torch.tensor([0, 3, 1]))


def counted(denoiser: NetworkDenoiser) -> list[int]:
    """Batch sizes of the network's calls."""
    calls: list[int] = []
    denoiser.network.register_forward_pre_hook(lambda m, a, kw: calls.append(len(kw["sample"])), with_kwargs=True)
    return calls


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.0])
def test_one_pass_equals_two(denoiser, x, scale):
    calls = counted(denoiser)
    guided = Guided(denoiser, denoiser.null, scale)(x, T, CONDITION)
    assert calls == [6]
    with_label = denoiser(x, T, CONDITION).value
    without = denoiser(x, T, Condition.of_labels(torch.full((3,), 4))).value
    assert float((with_label - without).abs().max()) > 1e-3
    torch.testing.assert_close(guided.value, without + scale * (with_label - without), rtol=0, atol=2e-6)


def test_off_is_one_plain_pass(denoiser, x):
    calls = counted(denoiser)
    guided = Guided(denoiser, denoiser.null)(x, T, CONDITION)
    assert calls == [3]
    assert torch.equal(guided.value, denoiser(x, T, CONDITION).value)


def test_a_scale_for_each_sample(denoiser, x):
    scales = torch.tensor([1.0, 3.0, 8.0])
    together = Guided(denoiser, denoiser.null).at(scales)(x, T, CONDITION).value
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        alone = Guided(denoiser, denoiser.null, scale)(x[row], T[row], CONDITION.rows(row)).value
        torch.testing.assert_close(together[row], alone, rtol=0, atol=5e-6)


def test_an_exact_teacher_is_guided_alike():
    teacher = five_modes(labelled=True).denoiser(Flow())
    x, labels = torch.randn(3, 2, dtype=torch.float64), Condition.of_labels(torch.tensor([0, 2, 4]))
    guided = Guided(teacher, teacher.null, 3.0)(x, T.double(), labels)
    conditional, null = teacher(x, T.double(), labels), teacher(x, T.double(), Condition.none())
    torch.testing.assert_close(guided.x0, null.x0 + 3.0 * (conditional.x0 - null.x0))


def test_guidance_needs_a_null_condition(denoiser):
    assert Guided(denoiser, None).process is denoiser.process
    with pytest.raises(UserError, match=r"teacher.guidance: 3.0 needs a conditional teacher; this one takes 1.0 only"):
        Guided(denoiser, None, 3.0)
    with pytest.raises(UserError, match=r"teacher.guidance"):
        Guided(denoiser, None).at(torch.tensor([1.0]))


# Classes N(2, s²) and N(−1, s²). With class 1 in the null condition's place, guidance towards class 0 is exact.
STD = 0.7
CLASSES = GaussianMixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[2.0], [-1.0]]), torch.tensor([STD, STD]), torch.tensor([0, 1])
)
TOWARDS, AWAY = Condition.of_labels(torch.tensor([0])), Condition.of_labels(torch.tensor([1]))


def mean_of(guided: Guided, times: tuple[float, ...], noise: torch.Tensor) -> float:
    """Of samples from noise in pairs ±ε, so that it has no sampling error."""
    noise = torch.cat([noise, -noise])
    return float(sample(guided, Sampler(times, "euler"), noise, TOWARDS.expand(len(noise))).mean())


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.5])
def test_guided_samples_have_the_closed_form_s_mean(scale, steps):
    """m_u + s·(m_c − m_u) in any number of Euler steps, where both laws have one variance."""
    teacher, noise = CLASSES.denoiser(Flow()), torch.randn(64, 1, dtype=torch.float64)
    guided = Guided(teacher, teacher.null, scale, negative=AWAY)
    assert mean_of(guided, Flow().step_list(steps), noise) == pytest.approx(-1 + scale * 3, abs=1e-9)


def test_an_interval_shifts_the_mean_by_its_share():
    """In (κ_lo, κ_hi]: m_c + (s − 1)(m_c − m_u)·s_d(1/√(s_d²+κ_lo²) − 1/√(s_d²+κ_hi²)) (Kynkäänniemi et al. 2024)."""
    process, low, high = EDM(), 0.19, 1.61
    window = tuple(to_fraction(process, kappa) for kappa in (low, high))
    teacher, noise = CLASSES.denoiser(process), torch.randn(8, 1, dtype=torch.float64)
    guided = Guided(teacher, teacher.null, 2.0, (window[0], window[1]), negative=AWAY)
    share = STD * (1 / math.hypot(STD, low) - 1 / math.hypot(STD, high))
    assert share == pytest.approx(0.56636, abs=1e-5)
    found = mean_of(guided, process.step_list(3000), noise) - mean_of(guided.at(1.0), process.step_list(3000), noise)
    assert found == pytest.approx(3 * share, rel=2e-3)


def to_fraction(process: EDM, kappa: float) -> float:
    low, high = (edge ** (1 / process.rho) for edge in (process.t_min, process.t_max))
    return (kappa ** (1 / process.rho) - low) / (high - low)


def test_the_interval_is_exact_on_and_off(denoiser, x):
    guided = Guided(denoiser, denoiser.null, 3.0)
    limited = replace(guided, interval=(0.3, 0.9))
    said, everywhere, plain = limited(x, T, CONDITION), guided(x, T, CONDITION), denoiser(x, T, CONDITION)
    assert torch.equal(said.value[1:], everywhere.value[1:]), "0.5 and the end itself, 0.9"
    torch.testing.assert_close(said.value[:1], plain.value[:1], rtol=0, atol=1e-6)
    assert float((everywhere.value[:1] - plain.value[:1]).abs().max()) > 1e-3


def test_outside_the_interval_there_is_no_second_branch(denoiser, x):
    calls = counted(denoiser)
    limited = Guided(denoiser, denoiser.null, 3.0, (0.0, 0.1))
    assert torch.equal(limited(x, T, CONDITION).value, denoiser(x, T, CONDITION).value)
    assert calls == [3, 3]
    limited(x, T - 0.15, CONDITION)
    assert calls == [3, 3, 6]


def test_drawn_scales_are_those_of_the_run_s_stream(denoiser, x):
    guided = Guided(denoiser, denoiser.null, (2.0, 6.0))
    scales = 2.0 + 4.0 * Rng(5).uniform(3)
    drawn = guided.drawn(Rng(5), 3)
    assert isinstance(drawn.scale, torch.Tensor)
    assert torch.equal(drawn.scale, scales)
    together = drawn(x, T, CONDITION).value
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        alone = Guided(denoiser, denoiser.null, scale)(x[row], T[row], CONDITION.rows(row)).value
        torch.testing.assert_close(together[row], alone, rtol=0, atol=5e-6)


def test_a_fixed_scale_draws_nothing(denoiser):
    rng, untouched = Rng(5), Rng(5)
    guided = Guided(denoiser, denoiser.null, 2.0)
    assert guided.drawn(rng, 3) is guided
    assert torch.equal(rng.uniform(4), untouched.uniform(4))


def test_a_range_that_is_not_drawn_from_is_refused(denoiser, x):
    with pytest.raises(UserError, match=r"teacher.guidance: \[2, 6\] is a range that training draws a scale"):
        Guided(denoiser, denoiser.null, (2.0, 6.0))(x, T, CONDITION)


def first_loss(method: str, guidance: float | list[float]) -> float:
    """Of the student's first turn, weights and draws being the same for every scale."""
    state = begin(config(METHODS[method], teacher={"guidance": guidance}, train={"steps": 7}))
    reports = iter(train(state))
    report = next(report for report in reports if "student" in report.gradient_norms)
    return float(report.terms.total) + float(report.terms.figures.get("score_gap", 0.0))


@pytest.mark.parametrize(
    "method",
    ["dmd2", "sid", "f_distill", "adversarial", "self_adversarial", "consistency", "scm", "flow_map", "flow_map_psd",
     "meanflow", "progressive", "scfm", "scflow"],
)  # fmt: skip
def test_methods_draw_from_a_range(method, monkeypatch):
    """A range around one number trains as the number does, a wide one does not."""
    wide = first_loss(method, [1.0, 9.0])
    narrow = first_loss(method, [3.0, 3.0 + 1e-6])

    def drawing_all_the_same(self: Guided, rng: Rng, batch: int) -> Guided:
        rng.uniform(batch)
        return self

    monkeypatch.setattr(Guided, "drawn", drawing_all_the_same)
    fixed = first_loss(method, 3.0)
    assert narrow == pytest.approx(fixed, rel=1e-4)
    assert wide != pytest.approx(fixed, rel=1e-3)


@pytest.mark.parametrize("told", ["same", "unconditional"])
def test_a_weak_model_is_the_reference(denoiser, x, told):
    """x̂_weak + s·(x̂ − x̂_weak), in whichever parametrisation each network speaks; the interval holds for it too."""
    weak = make_denoiser(alive(unet2d_classes(8, 4), 0.2), Schedule(Flow(), Kind.X0))
    guided = Guided(denoiser, denoiser.null, 2.5, weak=weak, weak_condition=told)
    null = CONDITION.nulled(Condition.of_labels(torch.tensor([4])), 3)
    strong, reference = denoiser(x, T, CONDITION).x0, weak(x, T, CONDITION if told == "same" else null).x0
    assert float((strong - reference).abs().max()) > 1e-2
    torch.testing.assert_close(guided(x, T, CONDITION).x0, reference + 2.5 * (strong - reference), rtol=0, atol=5e-6)
    limited = replace(guided, interval=(0.3, 1.0))(x, T, CONDITION).x0
    torch.testing.assert_close(limited[:1], strong[:1], rtol=0, atol=1e-6)


def test_a_weak_model_guides_an_unconditional_teacher(x):
    strong, weak = (make_denoiser(alive(unet2d(8), std), Schedule(Flow(), Kind.VELOCITY)) for std in (0.05, 0.2))
    guided = Guided(strong, None, 2.0, weak=weak)(x, T, Condition.none()).value
    wanted = 2 * strong(x, T, Condition.none()).value - weak(x, T, Condition.none()).value
    torch.testing.assert_close(guided, wanted, rtol=0, atol=5e-6)
    with pytest.raises(UserError, match="needs a conditional teacher"):
        Guided(strong, None, 2.0, weak=weak, weak_condition="unconditional")


def test_a_negative_condition_takes_the_null_s_place(denoiser, x):
    guided = Guided(denoiser, denoiser.null, 2.0, negative=Condition.of_labels(torch.tensor([2])))
    wanted = 2 * denoiser(x, T, CONDITION).value - denoiser(x, T, Condition.of_labels(torch.full((3,), 2))).value
    torch.testing.assert_close(guided(x, T, CONDITION).value, wanted, rtol=0, atol=5e-6)


def run_with(**teacher: Any) -> Guided:
    """The guided teacher of a run of the exact mixture, with another mixture for its weak model."""
    start = sources()
    weak = CLASSES.denoiser(Flow())
    run = config(METHODS["dmd2"], teacher=teacher)
    guided = guided_teacher(run.teacher, Sources(start.dataset, start.teacher, start.student, weak))
    assert guided is not None
    return guided


def test_a_run_s_settings_reach_its_teacher():
    guided = run_with(guidance=[2.0, 4.0], guidance_interval=[0.1, 0.6], negative=3)
    assert (guided.scale, guided.interval, guided.weak_condition) == ((2.0, 4.0), (0.1, 0.6), "same")
    assert guided.weak is not None
    assert guided.negative is not None
    assert guided.negative.labels is not None
    assert guided.negative.labels.tolist() == [3]
    assert guided.null is not None
    assert guided.null.labels is not None
    assert guided.null.labels.tolist() == [5]


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ({"guidance": 2.0, "negative": 5}, "teacher.negative: 5 given; the teacher's classes are 0 to 4"),
        (
            {"guidance_interval": [0.1, 0.6]},
            r"teacher.guidance_interval: \(0.1, 0.6\) given; teacher.guidance=1 is off",
        ),
        ({"negative": 1}, "teacher.negative: 1 given; teacher.guidance=1 is off"),
    ],
)
def test_settings_that_cannot_act_are_refused(teacher, line):
    with pytest.raises(UserError, match=line):
        begin(config(METHODS["dmd2"], teacher=teacher))


def test_an_interval_acts_on_a_student_s_own_scales():
    """The scales are drawn by the method then, and teacher.guidance stays at 1."""
    run = {**METHODS["consistency"], "guidance_range": [1.0, 4.0]}
    found = {}
    for interval in (None, [0.0, 1.0], [0.99, 1.0]):
        state = begin(config(run, teacher={"guidance_interval": interval}, train={"steps": 2}))
        found[str(interval)] = float(go(state)[0].terms.total)
    assert found["[0.0, 1.0]"] == found["None"]
    assert found["[0.99, 1.0]"] != found["None"]
