"""Derivatives of a network along a direction in its inputs: the tangents of continuous-time methods."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Derivative = Literal["jvp", "central_difference"]

STEP = 1e-2
"""Of the central difference, in units of the direction. diffusers embeds times in float32, which a much smaller step
would drown in, and flow times 1000-fold, which a much larger one would jump over."""


@dataclass(frozen=True)
class Tangent:
    """A function's value and its derivative along a direction, both `(B, *)`."""

    value: Tensor
    slope: Tensor


def along(
    function: Callable[..., Tensor],
    at: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    how: Derivative = "jvp",
    step: float = STEP,
) -> Tangent:
    """d/dh of `function(*(at + h·direction))` at h = 0, outside every graph.

    Args:
        function: of tensors; it must not keep state that depends on them.
        at: where.
        direction: one tensor for each of `at`, of its shape.
        how: forward-mode automatic differentiation, or (f(at + step·direction) − f(at − step·direction))/(2·step)
            where a kernel has no forward derivative. The latter costs one evaluation more. Both in full precision:
            mixed precision rounds a derivative away.
        step: of the difference.
    """
    with torch.no_grad(), _full_precision(at[0]):
        if how == "jvp":
            return forward_derivative(function, at, direction)
        ahead, behind = (
            function(*(x + sign * step * d for x, d in zip(at, direction, strict=True))) for sign in (1, -1)
        )
        return Tangent(function(*at), (ahead - behind) / (2 * step))


def forward_derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Tangent:
    """The same by forward-mode differentiation, inside the caller's graph, so that the slope can be trained.

    Attention runs on its plain kernel, the only one with a forward derivative, and mixed precision is off, under which
    a convolution may be given values and slopes of two precisions. A fused layer norm has a wrong second
    derivative, without an error: train slopes inside `arithmetic_layer_norm()` alone.
    """
    _load_rules()
    with sdpa_kernel(SDPBackend.MATH), _full_precision(at[0]), _not_compiled():
        both = torch.func.jvp(function, at, direction)
    return Tangent(both[0], both[1])


@cache
def _load_rules() -> None:
    """Have torch load its rules for forward derivatives, which it does at the first one.

    It scripts them with a function that it has deprecated itself, and nobody who trains can do anything about that.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """Mixed precision is off inside; the meta device has none to turn off.

    So is TF32, to whose 10 bits cuDNN rounds what convolutions are given unless it is told not to: a central difference
    at a step of 1/100 would lose most of its digits to that.
    """
    convolutions = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = before


def _not_compiled() -> AbstractContextManager[object]:
    """Inside, compiled modules run as they are: torch.compile gives up on one that it meets in a derivative, for good.

    Those that a run compiles know how to be differentiated (`fewstep.models.compiled_derivative`), and run compiled all
    the same. Where nothing was compiled there is nothing to hold off, and torch's compiler is not loaded for it.
    """
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()
