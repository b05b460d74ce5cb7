"""Two-time students: shares of a batch that no process changes, laws of jumps, and the path of every process."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow, TrigFlow
from fewstep.diffusion.times import Uniform
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.two_time import SpanLaw, TwoTime, WithAtom, advance, noise_end, two_time
from tests import tiny

TABLE = torch.linspace(0.9999, 0.003, 1000, dtype=torch.float64)


@pytest.mark.parametrize(
    ("share", "batch", "diagonal"),
    [(0.75, 8, [1, 2, 3, 5, 6, 7]), (0.5, 5, [1, 3]), (0.1, 10, [9]), (0.0, 3, []), (1.0, 3, [0, 1, 2])],
)
def test_the_diagonal_is_spread_over_the_batch(share, batch, diagonal):
    parts = SpanLaw(Uniform(Flow()), share).parts(batch)
    assert parts.diagonal.tolist() == diagonal
    assert sorted([*parts.diagonal.tolist(), *parts.jumps.tolist()]) == list(range(batch))


def test_two_processes_share_a_batch_as_one_does():
    law, u = SpanLaw(Uniform(Flow()), 0.75), torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    whole, halves = law.pairs(*u), [law.pairs(*half) for half in u.split(8, dim=1)]
    assert torch.equal(whole.t, torch.cat([half.t for half in halves]))
    assert torch.equal(whole.s, torch.cat([half.s for half in halves]))


def test_jumps_are_uniform_in_their_triangle_and_the_diagonal_on_its_line():
    u = torch.rand(2, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    law = SpanLaw(Uniform(Flow()), 0.5)
    pair, parts = law.pairs(*u), law.parts(200_000)
    jump, line = pair.t[parts.jumps], pair.t[parts.diagonal]
    assert bool((jump >= pair.s[parts.jumps]).all())
    assert torch.equal(line, pair.s[parts.diagonal])
    assert float(jump.mean()) == pytest.approx(2 / 3, abs=3e-3)
    assert float((jump - pair.s[parts.jumps]).mean()) == pytest.approx(1 / 3, abs=3e-3)
    assert float(line.mean()) == pytest.approx(1 / 2, abs=3e-3)


def test_an_atom_takes_its_share_and_leaves_the_law():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = WithAtom(Uniform(Flow()), 0.1, 1.0)(u)
    assert int((t == 1).sum()) == 1000
    torch.testing.assert_close(t[1000:].mean(), torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(WithAtom(Uniform(Flow()), 0.0, 1.0)(u), u)


def test_the_noise_end_is_where_the_process_s_sampler_starts():
    vp = VP(TABLE)
    t = torch.tensor([vp.step_list(1)[0]], dtype=torch.float64)
    assert noise_end(vp) == pytest.approx(float(vp.sigma(t) / (vp.alpha(t) + vp.sigma(t))), abs=1e-12)
    assert noise_end(EDM()) == pytest.approx(80 / 81)
    assert noise_end(Flow(3.0)) == noise_end(TrigFlow(0.5)) == 1.0


def test_velocity_and_jump_of_another_process_s_network():
    """A silent span on VP: u is the ODE's velocity there, at whatever length, and the jump one Euler step on Flow."""
    teacher = make_denoiser(tiny.alive(tiny.unet2d()), Schedule(VP(TABLE), Kind.V))
    student = two_time(teacher)
    assert student.graft.names == (SPAN,)
    assert two_time(student) is student
    x, t, r = torch.randn(2, 3, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.1, 0.4])
    flow = TwoTime.of(student)
    wanted = TwoTime.of(teacher).denoiser(x, t, Condition.none()).velocity
    assert torch.equal(flow.velocity(x, t, r, Condition.none()), wanted)
    jumped = flow.jump(x, t, r, Condition.none())
    torch.testing.assert_close(jumped[0], x[0] - 0.8 * wanted[0])
    assert torch.equal(jumped[1], x[1])


def test_advance_goes_from_t_to_r():
    exact, x = GaussianMixture.gaussian(1.5, 0.4), torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    t, r = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.1], dtype=torch.float64)
    landed = exact.flow_map(x, t, r, Flow())
    torch.testing.assert_close(advance(x, t, r, (x - landed) / (t - r)[:, None]), landed, rtol=0, atol=1e-12)
