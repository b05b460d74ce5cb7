from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.losses.consistency import (
    Boundary,
    EDMBoundary,
    LCMBoundary,
    PlainBoundary,
    l2,
    pseudo_huber_elements,
    pseudo_huber_norm,
)

TARGET = torch.zeros(2, 1, 1, 2)
PREDICTION = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 1, 1, 2)


def test_metrics_by_hand() -> None:
    assert l2(PREDICTION, TARGET).tolist() == pytest.approx([12.5, 0.0])
    elements = (math.sqrt(9 + 4) - 2 + math.sqrt(16 + 4) - 2) / 2
    assert pseudo_huber_elements(PREDICTION, TARGET, c=2.0).tolist() == pytest.approx([elements, 0.0])
    assert pseudo_huber_norm(PREDICTION, TARGET, c=2.0).tolist() == pytest.approx([math.sqrt(25 + 4) - 2, 0.0])


def test_the_default_norm_scale_grows_with_the_dimension() -> None:
    d = torch.full((1, 100), 1e-3)
    c = 0.00054 * 10
    expected = math.sqrt(100 * 1e-6 + c * c) - c
    assert pseudo_huber_norm(d, torch.zeros_like(d)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("huber", [pseudo_huber_elements, pseudo_huber_norm])
def test_small_differences_keep_their_value_and_gradient(huber: Callable[..., Tensor]) -> None:
    """The difference √(d² + c²) − c of float32 numbers is zero here; d²/2c is right, and so is d/c."""
    d = torch.tensor([[1e-7]], requires_grad=True)
    loss = huber(d, torch.zeros(1, 1), c=1e-3)
    assert loss.item() == pytest.approx(1e-14 / 2e-3, rel=1e-5)
    assert torch.autograd.grad(loss, d)[0].item() == pytest.approx(1e-4, rel=1e-5)


@pytest.mark.parametrize("huber", [pseudo_huber_elements, pseudo_huber_norm])
def test_no_difference_has_no_gradient_and_a_large_one_a_unit_gradient(huber: Callable[..., Tensor]) -> None:
    d = torch.tensor([[0.0], [-50.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(huber(d, torch.zeros(2, 1), c=1e-8).sum(), d)
    assert gradient.flatten().tolist() == pytest.approx([0.0, -1.0])


@pytest.mark.parametrize("huber", [pseudo_huber_elements, pseudo_huber_norm])
def test_metrics_of_bf16_are_float32_and_c_is_positive(huber: Callable[..., Tensor]) -> None:
    assert huber(PREDICTION.bfloat16(), TARGET.bfloat16(), c=1.0).dtype == torch.float32
    with pytest.raises(UserError, match=r"c: 0.0 given, it must be positive"):
        huber(PREDICTION, TARGET, c=0.0)


@pytest.mark.parametrize(
    ("boundary", "t"), [(EDMBoundary(), 0.002), (EDMBoundary(0.37, 0.013), 0.013), (LCMBoundary(), 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_boundary_f_is_x_bit_for_bit(boundary: Boundary, t: float, dtype: torch.dtype) -> None:
    x, x0 = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(boundary.apply(x, x0, torch.full((3,), t, dtype=dtype)), x)


def test_plain_boundary_is_the_clean_estimate() -> None:
    x, x0 = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PlainBoundary().apply(x, x0, torch.rand(3)), x0)


def test_edm_boundary_is_that_of_consistency_models() -> None:
    """f = c'_skip·x + c'_out·F, with x̂_0 made of the same F by EDM's preconditioning."""
    sd, least = 0.5, 0.002
    t = torch.tensor([0.002, 0.01, 0.5, 80.0], dtype=torch.float64)
    x, raw = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = t[:, None]
    skip, out = sd**2 / ((s - least) ** 2 + sd**2), (s - least) * sd / (s**2 + sd**2).sqrt()
    x0 = sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * raw
    torch.testing.assert_close(EDMBoundary(sd, least).apply(x, x0, t), skip * x + out * raw)


def test_lcm_boundary_by_hand() -> None:
    t = torch.tensor([0.0, 0.05, 999.0])
    boundary = LCMBoundary()
    assert boundary.c_skip(t).tolist() == pytest.approx([1.0, 0.5, 0.25 / (9990.0**2 + 0.25)])
    assert boundary.c_out(t).tolist() == pytest.approx([0.0, math.sqrt(0.5), 1.0])


@pytest.mark.parametrize("boundary", [EDMBoundary(), LCMBoundary(), PlainBoundary()])
def test_gradients_of_a_boundary_are_its_coefficients(boundary: Boundary) -> None:
    x, x0 = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    x, x0, t = x.requires_grad_(), x0.requires_grad_(), torch.tensor([0.04, 3.0])
    to_x, to_x0 = torch.autograd.grad(boundary.apply(x, x0, t).sum(), (x, x0), materialize_grads=True)
    torch.testing.assert_close(to_x, boundary.c_skip(t)[:, None].expand(2, 3))
    torch.testing.assert_close(to_x0, boundary.c_out(t)[:, None].expand(2, 3))


def test_a_boundary_of_bf16_is_float32() -> None:
    x = torch.ones(1, 2).bfloat16()
    assert EDMBoundary().apply(x, x, torch.tensor([1.0])).dtype == torch.float32
