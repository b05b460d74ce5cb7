"""Steps and samplers: identities between solvers, orders, exact students, gradients."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow, expand, transfer
from fewstep.diffusion.solvers import (
    Denoiser,
    Sampler,
    SamplerKind,
    dpmpp,
    euler,
    heun,
    jump,
    sample,
    teacher_step,
    trajectory,
)
from fewstep.errors import UserError
from fewstep.models.conditioning import SPAN, Condition

NONE = Condition.none()
KINDS: list[SamplerKind] = ["renoise", "ddim", "euler", "heun", "dpmpp"]
DATA = GaussianMixture.gaussian(1.5, 0.4)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def predictions(process: Process, t: Tensor) -> Prediction:
    x_t, value = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Prediction(process, x_t, t, value, Kind.V)


@dataclass(frozen=True)
class ExactStudent:
    """The consistency function of the data: from anywhere straight to the end of the trajectory."""

    mixture: GaussianMixture
    process: Process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        clean = self.mixture.flow_map(x_t, t, torch.full_like(t, self.process.t_min), self.process)
        return Prediction.of_x0(self.process, x_t, t, clean)


def test_jump_to_clean_data_is_x0(process: Process, inner_times: Tensor) -> None:
    prediction = predictions(process, inner_times)
    assert torch.equal(jump(prediction, None), prediction.x0)


def test_jump_to_the_same_time_stays(process: Process, inner_times: Tensor) -> None:
    prediction = predictions(process, inner_times)
    torch.testing.assert_close(jump(prediction, inner_times), prediction.x_t, rtol=1e-12, atol=1e-12)


def test_jump_has_each_process_known_form(vp: VP) -> None:
    t, s = tensor(0.9, 0.5), tensor(0.4, 0.1)
    flow = predictions(Flow(), t)
    torch.testing.assert_close(jump(flow, s), flow.x_t + (s - t)[:, None] * flow.velocity)
    edm = predictions(EDM(), 10 * t)
    ratio = (s / t)[:, None]
    torch.testing.assert_close(jump(edm, 10 * s), ratio * edm.x_t + (1 - ratio) * edm.x0)
    trig = predictions(TrigFlow(0.5), t)
    wanted = (t - s).cos()[:, None] * trig.x_t - (t - s).sin()[:, None] * trig.velocity
    torch.testing.assert_close(jump(trig, s), wanted)
    indices, prediction = 900 * s, predictions(vp, 900 * t)
    wanted = (
        expand(vp.alpha(indices), t[:, None]) * prediction.x0 + expand(vp.sigma(indices), t[:, None]) * prediction.eps
    )
    torch.testing.assert_close(jump(prediction, indices), wanted)


@pytest.mark.parametrize("process", [Flow(), EDM()])
def test_euler_is_jump_where_paths_are_straight(process: Process) -> None:
    t, s = process.at(tensor(0.9, 0.5, 0.2)), process.at(tensor(0.8, 0.1, 0.0))
    prediction = predictions(process, t)
    torch.testing.assert_close(euler(prediction, s), jump(prediction, s), rtol=1e-12, atol=1e-12)


def test_first_step_of_dpmpp_is_jump(process: Process, inner_times: Tensor) -> None:
    prediction, s = predictions(process, inner_times[1:]), inner_times[:-1]
    assert torch.equal(dpmpp(prediction, s, None), jump(prediction, s))


def test_dpmpp_without_change_of_x0_is_jump(process: Process, inner_times: Tensor) -> None:
    earlier, here, s = inner_times[2:], inner_times[1:-1], inner_times[:-2]
    x_t, x0 = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prediction = Prediction.of_x0(process, x_t, here, x0)
    found = dpmpp(prediction, s, Prediction.of_x0(process, x_t, earlier, x0))
    torch.testing.assert_close(found, jump(prediction, s), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_from_pure_noise_are_finite(process: Process, kind: SamplerKind, dtype: torch.dtype) -> None:
    noise = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for steps in (1, 2, 4):
        found = sample(DATA.denoiser(process), Sampler.of(process, steps, kind), noise, NONE)
        assert found.dtype == dtype
        assert bool(found.isfinite().all())


@pytest.mark.parametrize(("kind", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp", 2)])
@pytest.mark.parametrize("process", [Flow(), EDM(), TrigFlow(0.5)])
def test_orders_of_whole_trajectories(process: Process, kind: SamplerKind, order: int) -> None:
    mixture = GaussianMixture(tensor(0.3, 0.7), tensor(-1, 1)[:, None], tensor(0.4, 0.5))
    x = 1.3 * process.prior(tensor(-1.0, 0.2, 0.9)[:, None], float(process.at(tensor(0.7))))
    errors = []
    for steps in (40, 80, 160):
        times = process.at(torch.linspace(0.7, 0.3, steps + 1, dtype=torch.float64)).tolist()
        scale = float((x / process.prior(x, times[0])).mean())
        *_, last = trajectory(mixture.denoiser(process), Sampler(tuple(times), kind), x * scale, NONE)
        start, end = (torch.full((3,), t, dtype=torch.float64) for t in (times[0], times[-1]))
        errors.append((last.x_t - mixture.flow_map(x, start, end, process)).abs().max())
    found = torch.stack([errors[0] / errors[1], errors[1] / errors[2]]).log2()
    torch.testing.assert_close(found, torch.full_like(found, order), rtol=0, atol=0.25)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("euler", 2), ("heun", 3)])
def test_order_of_the_consistency_residual(solver, order: int, vp: VP) -> None:
    """|f(x_t, t) − f(step of the teacher, s)| for the exact f: one order above that of the solver."""
    process: Process = vp if solver == "ddim" else Flow()
    span, x, t = (
        (1000, tensor(0.8)[:, None], tensor(700)) if solver == "ddim" else (1, tensor(0.8)[:, None], tensor(0.7))
    )
    residuals = []
    for step in (0.1, 0.05, 0.025):
        s = t - step * span
        landed = teacher_step(DATA.denoiser(process), x, t, s, NONE, solver)
        clean = torch.full_like(t, process.t_min)
        residual = DATA.flow_map(x, t, clean, process) - DATA.flow_map(landed, s, clean, process)
        residuals.append(residual.abs().max())
    found = torch.stack([residuals[0] / residuals[1], residuals[1] / residuals[2]]).log2()
    torch.testing.assert_close(found, torch.full_like(found, order + 0.15), rtol=0, atol=0.2)


def test_two_ddim_steps_are_one_jump_of_the_progressive_target(process: Process, inner_times: Tensor) -> None:
    """Salimans & Ho 2022, algorithm 2: x̂_0 from which one DDIM step lands where two steps of the teacher do."""
    t, middle, s = inner_times[2:], inner_times[1:-1], inner_times[:-2]
    exact, x = DATA.denoiser(process), torch.randn(5, 1, dtype=torch.float64)
    landed = jump(exact(jump(exact(x, t, NONE), middle), middle, NONE), s)
    share = (process.sigma(s) / process.sigma(t))[:, None]
    target = (landed - share * x) / (process.alpha(s)[:, None] - share * process.alpha(t)[:, None])
    found = jump(Prediction.of_x0(process, x, t, target), s)
    torch.testing.assert_close(found, landed, rtol=1e-12, atol=1e-12)


def test_few_step_fixed_points_on_flow_matching() -> None:
    """The slope of the N-step Euler map is the product of 1 + (t_{i+1} − t_i)·A_{t_i}; the ODE's own is 0.4."""
    noise = tensor(0, 1)[:, None]
    for steps, slope in ((4, 0.25976), (8, 0.32511), (16, 0.36095), (50, 0.38710)):
        found = sample(DATA.denoiser(Flow()), Sampler.of(Flow(), steps, "euler"), noise, NONE).flatten()
        assert float(found[1] - found[0]) == pytest.approx(slope, abs=6e-6)
        assert float(found[0]) == pytest.approx(1.5, abs=1e-12)


def test_states_on_the_way_shrink_as_known() -> None:
    states = list(trajectory(DATA.denoiser(Flow()), Sampler.of(Flow(), 16, "euler"), tensor(0, 1)[:, None], NONE))
    assert [float(states[i].t[0]) for i in (0, 4, 8, 12)] == [1, 0.75, 0.5, 0.25]
    slopes = [float((states[i].x_t[1] - states[i].x_t[0]).squeeze()) for i in (4, 8, 12)]
    assert slopes == pytest.approx([0.7549, 0.5330, 0.3744], abs=5e-5)


def test_gradient_flows_through_every_step() -> None:
    noise = tensor(0.3)[:, None].requires_grad_()
    sample(DATA.denoiser(Flow()), Sampler.of(Flow(), 4, "euler"), noise, NONE).backward()
    assert noise.grad is not None
    assert float(noise.grad.squeeze()) == pytest.approx(0.25976, abs=6e-6)


@dataclass(frozen=True)
class ExactAverage:
    """The average velocity of the data's flow over the span that the condition tells: a perfect two-time student."""

    mixture: GaussianMixture
    process: Process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        state = transfer(x_t, t, self.process, Flow())
        there = state.t - condition.scalars[SPAN]
        landed = self.mixture.flow_map(state.x, state.t, there, Flow())
        velocity = (state.x - landed) / condition.scalars[SPAN][:, None]
        return Prediction.of_x0(self.process, x_t, t, state.x - state.t[:, None] * velocity)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["flow", "flow_shift", "vp"])
def test_a_perfect_flow_map_is_exact_in_any_number_of_steps(name: str, steps: int, vp: VP) -> None:
    """It lands on clean data, where t_min of a VP table is not, and stays on the trajectory in between."""
    process = {"flow": Flow(), "flow_shift": Flow(3.0), "vp": vp}[name]
    sampler = Sampler.of(process, steps, "flow_map")
    noise = tensor(-1.3, 0.2, 0.9)[:, None]
    states = list(trajectory(ExactAverage(DATA, process), sampler, noise, NONE))
    start = transfer(noise, process.times(sampler.times[0], noise), process, Flow())
    for i, state in enumerate(states):
        wanted = DATA.flow_map(noise, process.times(sampler.times[0], noise), state.t, process)
        torch.testing.assert_close(state.x_t, wanted, rtol=0, atol=1e-10)
        assert float(state.t[0]) == sampler.times[i]
    clean = DATA.flow_map(start.x, start.t, torch.zeros_like(start.t), Flow())
    torch.testing.assert_close(states[-1].x0, clean, rtol=0, atol=1e-10)


def test_a_flow_map_is_told_differences_of_flow_times(vp: VP) -> None:
    told: list[Tensor] = []

    @dataclass(frozen=True)
    class Noting:
        process: Process

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
            told.append(condition.scalars[SPAN])
            return Prediction.of_x0(self.process, x_t, t, x_t)

    noise = torch.zeros(2, 1, dtype=torch.float64)
    sample(Noting(Flow()), Sampler((1.0, 0.7, 0.2), "flow_map"), noise, NONE)
    assert [float(one[0]) for one in told] == pytest.approx([0.3, 0.5, 0.2])
    told.clear()
    sample(Noting(vp), Sampler((999.0, 500.0), "flow_map"), noise, NONE)
    high, low = (float(vp.sigma(tensor(i)) / (vp.alpha(tensor(i)) + vp.sigma(tensor(i)))) for i in (999, 500))
    assert [float(one[1]) for one in told] == pytest.approx([high - low, low])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_students_give_exact_samples(process: Process, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    student: Denoiser = ExactStudent(DATA, process)
    # p_T itself, of which the prior is an approximation
    clean, noise = DATA.sample(200_000, generator), torch.randn(200_000, 1, generator=generator)
    start = process.add_noise(clean, noise, process.times(process.t_max, clean)) / process.prior(torch.ones(1))
    found = sample(student, Sampler.of(process, steps), start, NONE, generator)
    assert float(found.mean()) == pytest.approx(1.5, abs=4e-3)
    assert float(found.std()) == pytest.approx(0.4, abs=4e-3)


def test_one_exact_step_from_the_prior_falls_short_by_what_is_left_of_the_mean(vp: VP) -> None:
    for process, shortfall in ((vp, 0.0418), (EDM(), 0.4 * 1.5 / 80), (Flow(), 0.0)):
        found = sample(ExactStudent(DATA, process), Sampler.of(process, 1), tensor(0)[:, None], NONE)
        assert float(found.squeeze()) == pytest.approx(1.5 - shortfall, abs=1e-4)


def test_renoising_draws_once_between_two_steps() -> None:
    noise, generator, again = torch.zeros(3, 1), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    states = list(trajectory(DATA.denoiser(Flow()), Sampler.of(Flow(), 3), noise, NONE, generator))
    for before, after in pairwise(states):
        drawn = torch.randn(3, 1, generator=again)
        torch.testing.assert_close(after.x_t, (1 - after.t)[:, None] * before.x0 + after.t[:, None] * drawn)
    assert torch.equal(generator.get_state(), again.get_state())


def test_heun_to_clean_data_never_asks_for_the_slope_there() -> None:
    asked: list[Tensor] = []

    @dataclass(frozen=True)
    class Noting:
        process: Process

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
            asked.append(t)
            return Prediction.of_x0(self.process, x_t, t, DATA.denoiser(self.process)(x_t, t, condition).x0)

    teacher, x, t, s = Noting(Flow()), tensor(0.5, 0.5)[:, None], tensor(0.4, 0.4), tensor(0.0, 0.2)
    found = heun(teacher, teacher(x, t, NONE), s, NONE)
    assert asked[1].tolist() == [0.4, 0.2]
    torch.testing.assert_close(found[0], teacher(x, t, NONE).x0[0])
    wanted = heun(DATA.denoiser(Flow()), DATA.denoiser(Flow())(x, t, NONE), s, NONE)
    torch.testing.assert_close(found[1], wanted[1])


def test_teacher_steps_are_the_solvers_own() -> None:
    teacher, x, t, s = DATA.denoiser(EDM()), tensor(3, -2)[:, None], tensor(5, 2), tensor(1, 0.5)
    prediction = teacher(x, t, NONE)
    assert torch.equal(teacher_step(teacher, x, t, s, NONE, "ddim"), jump(prediction, s))
    assert torch.equal(teacher_step(teacher, x, t, s, NONE, "euler"), euler(prediction, s))
    assert torch.equal(teacher_step(teacher, x, t, s, NONE, "heun"), heun(teacher, prediction, s, NONE))


def test_low_precision_noise_is_sampled_in_float32() -> None:
    noise = torch.ones(2, 1, dtype=torch.bfloat16)
    assert sample(DATA.denoiser(Flow()), Sampler.of(Flow(), 2), noise, NONE).dtype == torch.float32


def test_samplers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match=r"'eluer' is not one of .*; did you mean 'euler'"):
        Sampler((1.0,), "eluer")  # pyright: ignore[reportArgumentType]
    for times in ((), (0.5, 0.5), (0.2, 0.7)):
        with pytest.raises(UserError, match="sampler times"):
            Sampler(times)
