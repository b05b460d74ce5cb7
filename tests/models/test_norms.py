"""Norms in plain arithmetic: the fused kernels' numbers, and the second derivatives that one of them gets wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from fewstep.models.norms import arithmetic_group_norm, arithmetic_layer_norm

SHAPES = [((6,), True, True), ((5, 6), True, True), ((6,), True, False), ((6,), False, False)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "weighted", "biased"), SHAPES)
def test_it_is_the_fused_one_with_its_gradients(shape, weighted, biased):
    weight = randn(*shape, seed=1).requires_grad_() if weighted else None
    bias = randn(*shape, seed=2).requires_grad_() if biased else None
    x = (3 * randn(4, 5, 6) + 1).requires_grad_()
    inputs = [one for one in (x, weight, bias) if one is not None]
    fused = layer_norm(x, shape, weight, bias, 1e-3)
    with arithmetic_layer_norm():
        plain = layer_norm(x, shape, weight, bias, 1e-3)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-12)
    pull = randn(4, 5, 6, seed=3)
    for one, other in zip(*(torch.autograd.grad(out, inputs, pull) for out in (plain, fused)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3)])
@pytest.mark.parametrize(("weighted", "biased"), [(True, True), (True, False), (False, False)])
def test_group_norm_is_the_fused_one_with_its_gradients(shape, weighted, biased):
    weight = randn(6, seed=1).requires_grad_() if weighted else None
    bias = randn(6, seed=2).requires_grad_() if biased else None
    x = (3 * randn(*shape) + 1).requires_grad_()
    inputs = [one for one in (x, weight, bias) if one is not None]
    fused = group_norm(x, 3, weight, bias, 1e-3)
    with arithmetic_group_norm():
        plain = group_norm(x, 3, weight, bias, 1e-3)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-12)
    pull = randn(*shape, seed=3)
    for one, other in zip(*(torch.autograd.grad(out, inputs, pull) for out in (plain, fused)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_modules_are_reached_and_others_are_left_alone():
    x, norm, group = randn(4, 6), nn.LayerNorm(6).double(), nn.GroupNorm(2, 6).double()
    nn.init.normal_(norm.weight)
    calls: list[str] = []

    class Listening(arithmetic_layer_norm):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    with Listening():
        torch.testing.assert_close(norm(x), norm.forward(x))
        assert torch.equal(group(x), nn.functional.group_norm(x, 2, group.weight, group.bias, group.eps))
    assert "layer_norm" in calls


def trained_slope(x: Tensor, direction: Tensor, matrix: Tensor) -> Tensor:
    """Σ (d/dh LN(A·(x + h·d)))³, whose gradient with respect to A needs a second derivative of the norm."""

    def function(x: Tensor) -> Tensor:
        return layer_norm(x @ matrix, (6,))

    return torch.func.jvp(function, (x,), (direction,))[1].pow(3).sum()


@pytest.mark.parametrize("mended", [True, False])
def test_gradients_of_a_forward_derivative(mended):
    """Against central differences: right in arithmetic; the fused kernel's are 5 to 80 % off, without an error."""
    x, direction, matrix = randn(4, 6), randn(4, 6, seed=1), randn(6, 6, seed=2).requires_grad_()
    if mended:
        with arithmetic_layer_norm():
            (gradient,) = torch.autograd.grad(trained_slope(x, direction, matrix), matrix)
    else:
        (gradient,) = torch.autograd.grad(trained_slope(x, direction, matrix), matrix)
    along, step = randn(6, 6, seed=3), 1e-5
    ahead, behind = (trained_slope(x, direction, (matrix + sign * step * along).detach()) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    error = float(((gradient * along).sum() - difference).abs() / difference.abs())
    if mended:
        assert error < 1e-8
    else:
        assert error > 0.05, "PyTorch has mended its kernel: arithmetic_layer_norm can go"


def test_half_precision_stays_what_it_is():
    """The fused kernels average in float32 and round once."""
    x = (4 * randn(64, 256) + 30).bfloat16()
    for mode, norm in (
        (arithmetic_layer_norm, lambda x: layer_norm(x, (256,))),
        (arithmetic_group_norm, lambda x: group_norm(x, 4)),
    ):
        with mode():
            plain = norm(x)
        assert plain.dtype == torch.bfloat16
        exact, fused = norm(x.double()), norm(x)
        assert float((plain.double() - exact).abs().max()) <= 1.01 * float((fused.double() - exact).abs().max())
