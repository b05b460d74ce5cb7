"""Norms in plain arithmetic, for derivatives that torch's own kernels get wrong or cannot be traced through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewstep.diffusion.prediction import at_least_float32


class arithmetic_layer_norm(TorchFunctionMode):
    """Inside, `layer_norm` is computed from means and products, whose second derivatives are right.

    PyTorch's fused kernel holds mean and deviation constant in the derivative of its forward derivative: gradients of
    losses on tangents are then off by 5 to 80 % in common transformers, without an error (pytorch issue 196700).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        words: Mapping[str, Any] = kwargs or {}
        return _layer_norm(*args, **words) if func is functional.layer_norm else func(*args, **words)


class arithmetic_group_norm(TorchFunctionMode):
    """Inside, `group_norm` is computed from means and products, for torch.compile to trace derivatives through.

    It ends in an internal assertion of torch 2.15 where the weights of a fused norm, of groups or of layers, are none
    of the duals.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        words: Mapping[str, Any] = kwargs or {}
        return _group_norm(*args, **words) if func is functional.group_norm else func(*args, **words)


def _layer_norm(
    input: Tensor,  # the parameters' names are those of torch.nn.functional.layer_norm
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = _normalised(at_least_float32(input), tuple(range(-len(normalized_shape), 0)), eps)
    return _affine(out, weight, bias).to(input.dtype)


def _group_norm(
    input: Tensor,  # these are those of torch.nn.functional.group_norm
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = at_least_float32(input).unflatten(1, (num_groups, -1))
    out = _normalised(groups, tuple(range(2, groups.ndim)), eps).flatten(1, 2)
    each = (-1, *(1,) * (input.ndim - 2))
    return _affine(out, *(None if w is None else w.view(each) for w in (weight, bias))).to(input.dtype)


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Of at least float32, the fused kernels' precision."""
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = x if weight is None else x * weight
    return out if bias is None else out + bias
