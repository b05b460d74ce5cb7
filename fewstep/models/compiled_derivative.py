"""Forward derivatives of compiled modules, compiled too: at the call where the derivative meets the module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    _unwrap_for_grad,  # pyright: ignore[reportAttributeAccessIssue]
    _wrap_for_grad,  # pyright: ignore[reportAttributeAccessIssue]
    is_gradtrackingtensor,
    maybe_current_level,  # pyright: ignore[reportAttributeAccessIssue]
    maybe_get_level,
)
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fewstep.models.graft import Scalars
from fewstep.models.norms import arithmetic_group_norm, arithmetic_layer_norm

_log = logging.getLogger("fewstep.models")


class CompiledDerivative:
    """The compiled forward derivatives of one network's modules.

    torch.compile cannot begin inside a forward derivative, and gives up for good on a module that it meets there. So
    duals are taken apart at the module's call: one compiled function, outside of the derivative under way, makes of the
    values and slopes that go in those that come out, and duals are made of them again. Gradients flow through both.
    """

    def __init__(self, network: nn.Module, scalars: Scalars) -> None:
        """Of `network`, whose grafts read `scalars`: they may be dual, and no argument says so."""
        self._name, self._scalars, self._refused = type(network).__name__, scalars, False
        self._both = torch.compile(_value_and_slope, dynamic=False, fullgraph=True)

    def attach(self, module: nn.Module) -> None:
        """Have it take over the calls of `module`, which is compiled, inside forward derivatives. In place."""
        compiled = module._compiled_call_impl
        assert compiled is not None, "a module that is not compiled has nothing to keep from derivatives"

        def call(*args: Any, **kwargs: Any) -> Any:
            level = maybe_current_level()
            if level is None:
                return compiled(*args, **kwargs)
            if level != 1 or self._refused:  # a derivative inside another is torch's own affair
                return module._call_impl(*args, **kwargs)
            try:
                return self._dual(level, module._call_impl, args, kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = str(error).strip().partition("\n")[0]
                _log.warning("warning: %s: its forward derivative is not compiled: %s", self._name, reason)
                self._refused = True
                return module._call_impl(*args, **kwargs)

        module._compiled_call_impl = call

    def _dual(self, level: int, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a call in whose arguments there may be duals."""
        leaves, shape = tree_flatten((args, kwargs, dict(self._scalars.values)))
        pairs = [_apart(leaf, level) for leaf in leaves]
        moved = tuple(slope is not None for _, slope in pairs)
        slopes = tuple(slope for _, slope in pairs if slope is not None)
        if not slopes:
            return call(*args, **kwargs)  # nothing that it is given moves
        told = self._scalars.values
        try:
            # `forward_derivative` holds compilation off for the sake of modules that this one is not.
            with torch.compiler.set_stance("default"), temporarily_clear_interpreter_stack():
                values, changes = self._both(call, self._scalars, [value for value, _ in pairs], shape, moved, slopes)
        finally:
            self._scalars.values = told
        out, out_shape = tree_flatten(values)
        duals = (_together(value, slope, level) for value, slope in zip(out, tree_flatten(changes)[0], strict=True))
        return tree_unflatten(list(duals), out_shape)


def _value_and_slope(
    call: Callable[..., Any],
    scalars: Scalars,
    leaves: Sequence[Any],
    shape: TreeSpec,
    moved: Sequence[bool],
    slopes: tuple[Tensor, ...],
) -> tuple[Any, Any]:
    """A module's output, and its derivative along `slopes` in those of the `leaves` of its arguments that `moved`."""
    seen: list[tuple[list[Any], TreeSpec]] = []

    def of(*points: Tensor) -> tuple[Tensor, ...]:
        args, kwargs, scalars.values = tree_unflatten(_filled(leaves, moved, points), shape)
        parts, out_shape = tree_flatten(call(*args, **kwargs))
        scalars.values = {}  # what is left there comes out of the compiled function, and duals may not
        seen.append((parts, out_shape))
        return tuple(part for part in parts if isinstance(part, Tensor))

    with arithmetic_group_norm(), arithmetic_layer_norm():
        both = torch.func.jvp(of, tuple(leaf for leaf, dual in zip(leaves, moved, strict=True) if dual), slopes)
    parts, out_shape = seen.pop()
    there = [isinstance(part, Tensor) for part in parts]
    value, slope = [tree_unflatten(_filled(parts, there, one), out_shape) for one in both]
    return value, slope


def _filled(leaves: Sequence[Any], places: Sequence[bool], values: Sequence[Tensor]) -> list[Any]:
    given = iter(values)
    return [next(given) if place else leaf for leaf, place in zip(leaves, places, strict=True)]


def _apart(leaf: Any, level: int) -> tuple[Any, Tensor | None]:
    """A dual's value and slope; anything else as it is, and no slope."""
    if not (isinstance(leaf, Tensor) and is_gradtrackingtensor(leaf) and maybe_get_level(leaf) == level):
        return leaf, None
    value, slope = forward_ad.unpack_dual(leaf)
    if slope is None:
        return _unwrap_for_grad(value, level), None
    slope = _unwrap_for_grad(slope, level)
    return _unwrap_for_grad(value, level), torch.zeros_like(slope) if slope._is_zerotensor() else slope


def _together(value: Any, slope: Any, level: int) -> Any:
    """The dual of a value and its slope; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    return forward_ad.make_dual(_wrap_for_grad(value, level), _wrap_for_grad(slope, level))
