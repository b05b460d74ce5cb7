"""Our steps are those of diffusers' schedulers.

The schedulers keep ᾱ and σ in float32, so that even in float64 their coefficients carry errors of 6e-8, which the
division by α = 0.07 at the noise end multiplies by up to 15: hence 1e-6, and 1e-5 over whole float32 loops.
"""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, TrigFlow
from fewstep.diffusion.solvers import Sampler, euler, jump, sample
from fewstep.models.conditioning import Condition

library: Any = diffusers  # its `step` is annotated as a union that no type checker can narrow
NONE = Condition.none()
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
TRAILING: dict[str, Any] = {"timestep_spacing": "trailing"}
# these schedulers call numpy.array on tensors, which numpy 2 deprecates
ARRAYS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KINDS = [Kind.EPS, Kind.X0, Kind.V]
DATA = GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.4, 0.5], dtype=torch.float64)
)


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def draw(shape: tuple[int, ...] = (2, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    x, out = torch.randn(2, *shape, generator=seed(), dtype=torch.float64)
    return x, out


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=tolerance, atol=tolerance)


def index(value: float) -> Tensor:
    return torch.full((2,), float(value), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim(kind: Kind) -> None:
    scheduler = library.DDIMScheduler(**SD, **TRAILING, prediction_type=kind.value)
    scheduler.set_timesteps(4)
    process, (x, out) = VP(scheduler.alphas_cumprod), draw()
    assert tuple(scheduler.timesteps.tolist()) == process.step_list(4)
    for t, s in ((999, 749), (749, 499), (499, 249), (249, None)):
        prediction = Prediction(process, x, index(t), out, kind)
        close(jump(prediction, None if s is None else index(s)), scheduler.step(out, t, x).prev_sample)


def test_trailing_lists_agree_for_every_count() -> None:
    scheduler = library.DDIMScheduler(**SD, **TRAILING)
    process = VP(scheduler.alphas_cumprod)
    for steps in (1, 2, 3, 4, 6, 7, 8, 16, 30, 50, 999, 1000):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist())[:steps] == process.step_list(steps)


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_posterior(kind: Kind) -> None:
    """q(x_s | x_t, x̂_0) from the kernel: mean (a·σ_s²·x_t + α_s·b²·x̂_0)/σ_t², standard deviation b·σ_s/σ_t."""
    scheduler = library.DDPMScheduler(**SD, **TRAILING, prediction_type=kind.value, variance_type="fixed_small")
    scheduler.set_timesteps(10)
    process, (x, out) = VP(scheduler.alphas_cumprod), draw()
    for t, s in ((999, 899), (499, 399), (199, 99)):
        kernel = process.kernel(index(s), index(t))
        prediction = Prediction(process, x, index(t), out, kind)
        low, high = process.sigma(index(s)).square()[0], process.sigma(index(t)).square()[0]
        mean = (
            kernel.scale[0] * low / high * x
            + process.alpha(index(s))[0] * kernel.std[0].square() / high * prediction.x0
        )
        noise = torch.randn(x.shape, generator=seed(1), dtype=torch.float64)
        found = mean + kernel.std[0] * (low / high).sqrt() * noise
        wanted = scheduler.step(out, t, x, generator=seed(1)).prev_sample
        close(found, wanted, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lcm(kind: Kind) -> None:
    scheduler = library.LCMScheduler(**SD, prediction_type=kind.value)
    scheduler.set_timesteps(4)
    process, (x, out) = VP(scheduler.alphas_cumprod), draw()
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    for t, s in ((999, 759), (759, 499), (499, 259)):
        noise = torch.randn(x.shape, generator=seed(t), dtype=torch.float64)
        found = process.add_noise(Prediction(process, x, index(t), out, kind).x0, noise, index(s))
        close(found, scheduler.step(out, t, x, generator=seed(t)).prev_sample)
    close(Prediction(process, x, index(259), out, kind).x0, scheduler.step(out, 259, x).prev_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_lcm_loop_with_the_same_generator(dtype: torch.dtype) -> None:
    scheduler = library.LCMScheduler(**SD)
    scheduler.set_timesteps(4)
    process = VP(scheduler.alphas_cumprod)
    teacher, noise, generator = DATA.denoiser(process), torch.randn(64, 2, generator=seed(), dtype=dtype), seed(7)
    x = noise
    for t in scheduler.timesteps:
        eps = teacher(x, process.times(float(t), x), NONE).eps
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    found = sample(teacher, Sampler((999, 759, 499, 259)), noise, NONE, seed(7))
    close(found, x, 1e-5 if dtype == torch.float32 else 2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(eta: float) -> None:
    scheduler = library.TCDScheduler(**SD)
    scheduler.set_timesteps(4)
    process, (x, out) = VP(scheduler.alphas_cumprod), draw()
    for t, following in ((999, 759), (759, 499), (499, 259)):
        s = int((1 - eta) * following)
        noise = torch.randn(x.shape, generator=seed(t), dtype=torch.float64)
        landed = jump(Prediction(process, x, index(t), out, Kind.EPS), index(s))
        found = process.renoise(landed, noise if eta else torch.zeros_like(noise), index(s), index(following))
        close(found, scheduler.step(out, t, x, eta=eta, generator=seed(t)).prev_sample)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift: float) -> None:
    process, (x, out) = Flow(shift), draw()
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=Flow().step_list(4))  # the scheduler bends them itself
    assert scheduler.sigmas.tolist() == pytest.approx([*process.step_list(4), 0], abs=1e-6)
    grid = scheduler.sigmas.double()
    for i, t in enumerate(scheduler.timesteps):
        prediction = Prediction(process, x, grid[i].expand(2), out, Kind.VELOCITY)
        wanted = scheduler.step(out, t, x.float()).prev_sample
        close(euler(prediction, grid[i + 1].expand(2)), wanted)
        close(jump(prediction, grid[i + 1].expand(2)), wanted)


def test_flow_matching_stochastic() -> None:
    process, (x, out) = Flow(), draw()
    scheduler = library.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=process.step_list(2))
    torch.manual_seed(3)
    wanted = scheduler.step(out.float(), scheduler.timesteps[0], x.float()).prev_sample
    torch.manual_seed(3)
    noise = torch.randn(x.shape)
    found = process.add_noise(Prediction(process, x, index(1), out, Kind.VELOCITY).x0, noise, index(0.5))
    close(found, wanted)


def test_trigflow() -> None:
    process, (x, out) = TrigFlow(0.5), draw()
    scheduler = library.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(2)
    t, s, _ = scheduler.timesteps.double()
    # the scheduler's x_0 is that of unit σ_d, cos(t)·x − sin(t)·u, the same line for every σ_d
    prediction = Prediction(process, x, t.expand(2), out, Kind.VELOCITY)
    result = scheduler.step(out, scheduler.timesteps[0], x, generator=seed(1))
    close(prediction.x0, result.pred_original_sample)
    noise = torch.randn(x.shape, generator=seed(1))
    close(process.add_noise(prediction.x0, noise, s.expand(2)), result.prev_sample)


@ARRAYS
def test_edm_euler() -> None:
    scheduler = library.EulerDiscreteScheduler(**{k: v for k, v in SD.items() if k != "clip_sample"}, **TRAILING)
    scheduler.set_timesteps(4)
    process, (x, out), grid = EDM(), draw(), scheduler.sigmas.double()
    for i in range(4):
        prediction = Prediction(process, x, grid[i].expand(2), out, Kind.EPS)
        wanted = scheduler.step(out, scheduler.timesteps[i], x).prev_sample
        close(euler(prediction, grid[i + 1].expand(2)), wanted)


@ARRAYS
@pytest.mark.parametrize("steps", [2, 5, 12])
def test_whole_dpm_solver_loop(steps: int) -> None:
    config = {k: v for k, v in SD.items() if k != "clip_sample"}
    scheduler = library.DPMSolverMultistepScheduler(**config, **TRAILING, solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    process = VP(scheduler.alphas_cumprod)
    teacher, noise = DATA.denoiser(process), torch.randn(32, 2, generator=seed(), dtype=torch.float64)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(teacher(x, process.times(float(t), x), NONE).eps, t, x).prev_sample
    assert tuple(scheduler.timesteps.tolist()) == process.step_list(steps)
    close(sample(teacher, Sampler.of(process, steps, "dpmpp"), noise, NONE), x, 1e-5)
