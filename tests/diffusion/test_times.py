"""Laws of times: quantiles, moments, bounds, neighbours."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.diffusion.times import (
    Beta,
    Choice,
    GridPairs,
    Karras,
    Law,
    LogitNormal,
    LogNormal,
    RatioPairs,
    Uniform,
    annealed,
    below,
    ordered,
)
from fewstep.errors import UserError

EDGES = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])


def quantiles(n: int = 100_000) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize(
    "law",
    [
        Uniform(Flow()),
        Uniform(Flow(), 0.02, 0.98, shift=5),
        LogitNormal(Flow(), 0.5, 2.0),
        Beta(Flow(), 0.3, 0.4),
        Beta(Flow(), 4, 1.5),
        LogNormal(EDM(), -1.2, 1.2),
        Karras(EDM()),
        Choice((0.2, 0.7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_law_rises_with_u_and_keeps_its_type(law: Law, dtype: torch.dtype) -> None:
    found = law(torch.cat([EDGES[:2], torch.linspace(0.01, 0.99, 50), EDGES[3:]]).to(dtype))
    assert found.dtype == dtype
    assert found.shape == (53,)
    assert bool(found.isfinite().all())
    assert bool((found.diff() >= 0).all())
    assert bool((found >= 0).all())


def test_window_on_each_process(vp: VP) -> None:
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert Uniform(vp, 0.02, 0.98)(u).tolist() == pytest.approx([20, 980])
    assert Uniform(vp)(u).tolist() == [0, 999]
    assert Uniform(Flow(), 0.02, 0.98)(u).tolist() == pytest.approx([0.02, 0.98])
    assert Uniform(TrigFlow(0.5), 0.5, 1.0)(u).tolist() == pytest.approx([math.pi / 4, math.pi / 2])
    assert Uniform(EDM())(u).tolist() == pytest.approx([0.002, 80])


def test_uniform_is_uniform() -> None:
    found = Uniform(Flow(), 0.2, 0.8)(quantiles())
    assert float(found.mean()) == pytest.approx(0.5)
    assert float(found.std()) == pytest.approx(0.6 / math.sqrt(12), rel=1e-4)


def test_shifted_uniform() -> None:
    # without a window the median 1/2 goes to shift/(1 + shift)
    assert float(Uniform(Flow(), shift=3)(torch.tensor([0.5]))) == pytest.approx(0.75)
    windowed = Uniform(Flow(), 0.1, 0.6, shift=3)
    assert windowed(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.6])
    # within the window it is the same law, conditioned on the window
    plain = Uniform(Flow(), shift=3)(quantiles())
    kept = plain[(plain > 0.1) & (plain < 0.6)]
    assert float(windowed(quantiles()).mean()) == pytest.approx(float(kept.mean()), abs=1e-4)


def test_logit_normal() -> None:
    found = LogitNormal(Flow(), -0.4, 1.3)(quantiles()).logit()
    assert float(found.mean()) == pytest.approx(-0.4, abs=1e-6)
    assert float(found.std()) == pytest.approx(1.3, rel=1e-3)


def test_log_normal_on_every_process(process: Process) -> None:
    u = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    wanted = (-0.3 + 0.8 * torch.special.ndtri(u)).exp()
    torch.testing.assert_close(process.ratio(LogNormal(process, -0.3, 0.8)(u)), wanted)


def test_karras() -> None:
    found = Karras(EDM(), 0.002, 80, 7)(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert found.tolist() == pytest.approx([0.002, middle, 80])
    assert middle == pytest.approx(2.5152, rel=1e-4)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.4), (0.5, 0.5), (1, 1), (2, 5), (4, 1.5), (30, 60)])
def test_beta_has_its_moments(a: float, b: float) -> None:
    found = Beta(Flow(), a, b)(quantiles())
    assert float(found.mean()) == pytest.approx(a / (a + b), abs=2e-5)
    assert float(found.std()) == pytest.approx(math.sqrt(a * b / (a + b + 1)) / (a + b), rel=1e-3)


def test_beta_where_its_quantiles_are_known() -> None:
    u = torch.tensor([1e-4, 0.1, 0.37, 0.5, 0.99], dtype=torch.float64)
    for a, b, wanted in (
        (1, 1, u),
        (2, 1, u.sqrt()),
        (1, 3, 1 - (1 - u) ** (1 / 3)),
        (0.5, 0.5, (u * math.pi / 2).sin().square()),
    ):
        torch.testing.assert_close(Beta(Flow(), a, b)(u), wanted, rtol=0, atol=1e-5)


def test_choice_takes_each_time_equally_often() -> None:
    found = Choice((999, 749, 499, 249))(quantiles(1000).float())
    values, counts = found.unique(return_counts=True)
    assert values.tolist() == [249, 499, 749, 999]
    assert counts.tolist() == [250] * 4


def test_below_never_reaches_n() -> None:
    assert below(1000, torch.tensor([0.0, 0.0005, 0.001, 1 - 2.0**-24, 1.0])).tolist() == [0, 0, 1, 999, 999]
    assert below(3, EDGES).dtype == torch.int64


def test_lcm_neighbours(vp: VP) -> None:
    pairs = GridPairs(vp, 50)(quantiles(50).float())
    assert pairs.t.tolist() == [20.0 * (i + 1) - 1 for i in reversed(range(50))]
    assert pairs.s.tolist() == [max(20.0 * (i + 1) - 1 - 20, 0) for i in reversed(range(50))]


def test_neighbours_with_a_skip_stop_at_the_clean_end() -> None:
    pairs = GridPairs(Flow(), 4, skip=3)(quantiles(4))
    assert pairs.t.tolist() == [1, 0.75, 0.5, 0.25]
    assert pairs.s.tolist() == [0.25, 0, 0, 0]


def test_karras_neighbours_are_those_of_forty_points() -> None:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    grid = [(high + i / 39 * (low - high)) ** 7 for i in range(40)]
    pairs = GridPairs(EDM(), 39)(quantiles(39))
    assert pairs.t.tolist() == pytest.approx(grid[:-1])
    assert pairs.s.tolist() == pytest.approx(grid[1:])


def test_ect_pairs_follow_their_formula() -> None:
    law = LogNormal(EDM(), -1.1, 2.0)
    for stage in (0, 3):
        pairs = RatioPairs(EDM(), law, stage)(quantiles(1000))
        wanted = (pairs.t - pairs.t * 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-pairs.t))).clamp_min(0)
        torch.testing.assert_close(pairs.s, wanted)
        torch.testing.assert_close(pairs.t, law(quantiles(1000)))
    first, fourth = (RatioPairs(EDM(), law, stage)(quantiles(1000)).s == 0 for stage in (0, 3))
    assert float(first.double().mean()) == pytest.approx(0.9, abs=0.1)
    assert int(fourth.sum()) == 0


def test_ect_ratio_has_a_limit() -> None:
    far = RatioPairs(EDM(), Choice((60.0,)), stage=3)(quantiles(1))
    assert float(far.s / far.t) == pytest.approx(1 - 1 / 16)
    late = RatioPairs(EDM(), Choice((60.0,)), stage=40)(quantiles(1))
    assert float(late.s / late.t) == pytest.approx(0.999)


def test_ect_pairs_have_the_same_noise_levels_on_every_process(process: Process) -> None:
    u, flow = torch.tensor([0.4, 0.6, 0.8], dtype=torch.float64), Flow()
    found = RatioPairs(process, LogNormal(process, 0.0, 0.5), stage=4)(u)
    wanted = RatioPairs(flow, LogNormal(flow, 0.0, 0.5), stage=4)(u)
    torch.testing.assert_close(process.ratio(found.s), flow.ratio(wanted.s))


def test_ordered() -> None:
    pair = ordered(torch.tensor([0.2, 0.9]), torch.tensor([0.7, 0.1]))
    torch.testing.assert_close(pair.t, torch.tensor([0.7, 0.9]))
    torch.testing.assert_close(pair.s, torch.tensor([0.2, 0.1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(Flow(), 0.5, 0.5), "time window"),
        (lambda: Uniform(Flow(), -0.1, 0.5), "time window"),
        (lambda: Uniform(Flow(), 0.1, 1.5), "time window"),
        (lambda: Uniform(Flow(), shift=0), "time shift"),
        (lambda: Beta(Flow(), 0, 1), "beta law"),
        (lambda: Karras(EDM(), 1, 0.5), "karras law"),
        (lambda: Choice(()), "times to choose from"),
        (lambda: GridPairs(Flow(), 0), "skip: 1 given, 1 to 0"),
        (lambda: GridPairs(Flow(), 4, 5), "skip: 5 given, 1 to 4"),
        (lambda: GridPairs(Flow(), 4, 0), "skip: 0 given, 1 to 4"),
    ],
)
def test_impossible_laws_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_annealed_window_falls_to_its_place() -> None:
    window = (0.02, 0.98)
    assert annealed(window, 0.5, 0.0) == pytest.approx((0.692, 0.98))
    assert annealed(window, 0.5, 0.25) == pytest.approx((0.356, 0.98))
    assert annealed(window, 0.5, 0.5) == window
    assert annealed(window, 0.0, 0.0) == window
