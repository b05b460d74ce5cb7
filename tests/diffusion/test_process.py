"""Processes: derivatives, inverse, kernels, changes of process, step lists."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow, expand, transfer
from fewstep.errors import UserError


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_derivatives_are_those_of_alpha_and_sigma(process: Process, inner_times: Tensor) -> None:
    t = inner_times.requires_grad_()
    d_alpha = torch.zeros_like(t) if isinstance(process, EDM) else torch.autograd.grad(process.alpha(t).sum(), t)[0]
    (d_sigma,) = torch.autograd.grad(process.sigma(t).sum(), t)
    close(process.d_alpha(t), d_alpha)
    close(process.d_sigma(t), d_sigma)


def test_derivatives_agree_with_finite_differences(process: Process, inner_times: Tensor) -> None:
    h = 1e-5
    for value, rate in ((process.alpha, process.d_alpha), (process.sigma, process.d_sigma)):
        slope = (value(inner_times + h) - value(inner_times - h)) / (2 * h)
        torch.testing.assert_close(rate(inner_times), slope, rtol=1e-7, atol=1e-9)


def test_time_at_inverts_ratio(process: Process, inner_times: Tensor) -> None:
    close(process.time_at(process.ratio(inner_times)), inner_times)


def test_fractions_run_from_clean_to_noise(process: Process) -> None:
    ends = process.at(tensor(0.0, 0.3, 1.0))
    close(ends[[0, 2]], tensor(process.t_min, process.t_max))
    assert ends[0] < ends[1] < ends[2]


def test_kernels_compose_to_add_noise(process: Process, inner_times: Tensor) -> None:
    s, t = inner_times[:-1], inner_times[1:]
    kernel = process.kernel(s, t)
    close(kernel.scale * process.alpha(s), process.alpha(t))
    close((kernel.scale * process.sigma(s)).square() + kernel.std.square(), process.sigma(t).square())


def test_renoising_from_an_intermediate_level_has_the_moments_of_add_noise() -> None:
    # x_0 = 1.5 at t = 0.4, taken to t = 0.7: N(0.45, 0.7²)
    generator = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 400_000, 1, generator=generator, dtype=torch.float64)
    s, t = tensor(0.4).expand(400_000), tensor(0.7).expand(400_000)
    x = Flow().renoise(Flow().add_noise(torch.full_like(noise, 1.5), noise, s), fresh, s, t)
    assert float(x.mean()) == pytest.approx(0.450, abs=4e-3)
    assert float(x.std()) == pytest.approx(0.700, abs=4e-3)


def test_kernel_to_the_same_time_is_the_identity(process: Process, inner_times: Tensor) -> None:
    x = torch.ones(len(inner_times), 3, 2, 2, dtype=torch.float64)
    close(process.renoise(x, torch.ones_like(x), inner_times, inner_times), x, 1e-6)


def test_transfer_there_and_back(process: Process, inner_times: Tensor, vp: VP) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for other in (vp, EDM(), Flow(), TrigFlow(1.0)):
        there = transfer(x, inner_times, process, other)
        inside = (there.t > 0) & (there.t < other.t_max)  # VP clamps what lies beyond its table
        back = transfer(there.x, there.t, other, process)
        assert int(inside.sum()) >= 3
        close(back.t[inside], inner_times[inside])
        close(back.x[inside], x[inside])


def test_transfer_keeps_data_and_noise(process: Process, inner_times: Tensor) -> None:
    x0, noise = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for other in (EDM(), Flow(), TrigFlow(0.7)):
        moved = transfer(process.add_noise(x0, noise, inner_times), inner_times, process, other)
        close(moved.x, other.add_noise(x0, noise, moved.t))


def test_transfer_to_flow_matching_in_closed_form(process: Process, inner_times: Tensor) -> None:
    x, alpha, sigma = torch.ones(7, 1, dtype=torch.float64), process.alpha(inner_times), process.sigma(inner_times)
    moved = transfer(x, inner_times, process, Flow())
    close(moved.t, sigma / (alpha + sigma))
    close(moved.x, x / expand(alpha + sigma, x))


def test_transfer_to_trigflow_in_closed_form(process: Process, inner_times: Tensor) -> None:
    x, alpha, sigma, sd = torch.ones(7, 1, dtype=torch.float64), *_levels(process, inner_times), 0.5
    moved = transfer(x, inner_times, process, TrigFlow(sd))
    close(moved.t, torch.atan(sigma / (sd * alpha)))
    close(moved.x, x * expand(sd / (alpha.square() * sd**2 + sigma.square()).sqrt(), x))


def _levels(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    return process.alpha(t), process.sigma(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pure_noise_goes_to_the_noise_end(dtype: torch.dtype, vp: VP) -> None:
    # σ/α is infinite here; in float32 cos(π/2) is even slightly negative
    x = torch.ones(1, 2, dtype=dtype)
    for source in (Flow(), TrigFlow(1.0)):
        t = torch.full((1,), source.t_max, dtype=dtype)
        for target, scale in ((vp, vp.sigma(vp.times(999.0, x))), (EDM(), 80.0), (Flow(), 1.0), (TrigFlow(0.5), 0.5)):
            moved = transfer(x, t, source, target)
            torch.testing.assert_close(moved.t, torch.full_like(t, target.t_max))
            torch.testing.assert_close(moved.x, x * scale)


def test_vp_meets_its_table(vp: VP) -> None:
    index = torch.arange(1000, dtype=torch.float64)
    close(vp.alpha(index), vp.alphas_cumprod.sqrt())
    close(vp.sigma(index), (1 - vp.alphas_cumprod).sqrt())


def test_vp_is_log_linear_between_entries(vp: VP) -> None:
    levels = vp.ratio(tensor(500.0, 500.25, 501.0)).log()
    close(levels[1], 0.75 * levels[0] + 0.25 * levels[2])


def test_zero_terminal_snr_stays_finite(vp: VP) -> None:
    table = vp.alphas_cumprod.sqrt()
    table = ((table - table[-1]) * table[0] / (table[0] - table[-1])).square()
    capped, end = VP(table), torch.tensor([999.0])
    assert float(capped.alpha(end)) == pytest.approx(math.exp(-20), rel=1e-5)
    assert float(capped.sigma(end)) == 1.0
    assert bool(torch.isfinite(torch.stack([capped.d_alpha(end), capped.d_sigma(end), capped.ratio(end)])).all())


def test_step_lists(vp: VP) -> None:
    assert vp.step_list(1) == (999,)
    assert vp.step_list(4) == (999, 749, 499, 249)
    assert Flow().step_list(4) == (1, 0.75, 0.5, 0.25)
    assert Flow(shift=3).step_list(4) == pytest.approx((1, 0.9, 0.75, 0.5))
    assert TrigFlow(0.5).step_list(2) == pytest.approx((math.pi / 2, math.pi / 4))
    assert EDM().step_list(2) == pytest.approx((80.0, 2.5152), rel=1e-4)


def test_edm_grid_is_that_of_karras() -> None:
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    wanted = [(high + i / 39 * (low - high)) ** 7 for i in range(40)]
    assert (*EDM().step_list(39), EDM().t_min) == pytest.approx(wanted)


def test_step_lists_refuse_impossible_counts(process: Process) -> None:
    with pytest.raises(UserError, match="steps: 0 given"):
        process.step_list(0)


def test_vp_refuses_more_steps_than_its_table_has(vp: VP) -> None:
    with pytest.raises(UserError, match="steps: 1001 given, allowed are 1 to 1000"):
        vp.step_list(1001)


@pytest.mark.parametrize("table", [[0.9], [0.5, 0.9], [1.0, 0.5], [0.9, -0.1], [[0.9, 0.5]]])
def test_vp_refuses_what_is_no_table(table: list[float]) -> None:
    with pytest.raises(UserError, match="alphas_cumprod"):
        VP(torch.tensor(table))


def test_prior(vp: VP) -> None:
    noise = torch.ones(2, 3)
    for process, scale in ((vp, 1.0), (Flow(), 1.0), (EDM(), 80.0), (TrigFlow(0.5), 0.5)):
        assert torch.equal(process.prior(noise), scale * noise)
    assert torch.equal(EDM().prior(noise, 3.0), 3 * noise)
    assert replace(EDM(), t_max=160.0).prior(noise)[0, 0] == 160


def test_times_keep_their_precision_beside_low_precision_samples() -> None:
    assert Flow().times(0.3, torch.zeros(2, 1, dtype=torch.bfloat16)).dtype == torch.float32
    noisy = Flow().add_noise(torch.ones(2, 1, dtype=torch.bfloat16), torch.zeros(2, 1), torch.tensor([0.3, 0.301]))
    assert noisy.dtype == torch.float32
    assert noisy.flatten().tolist() == pytest.approx([0.7, 0.699])


def test_a_table_made_inside_a_derivative_does_not_outlive_it() -> None:
    table = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    process, t = VP(table), tensor(3.3, 700.1)

    def change(t: Tensor) -> Tensor:
        return torch.func.jvp(process.sigma, (t,), (torch.ones_like(t),))[1].sum()

    first = torch.func.grad(change)(t)
    assert torch.equal(torch.func.grad(change)(t), first)
    close(torch.func.jvp(process.sigma, (t,), (torch.ones_like(t),))[1], process.d_sigma(t))
    assert torch.equal(process.alpha(t), VP(table).alpha(t))
