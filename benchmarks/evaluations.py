"""The network evaluations of a step: recorded while it runs, and run again by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from fewstep.models.layer_norm import arithmetic_layer_norm


@dataclass(frozen=True)
class Evaluation:
    """One call of a network.

    Attributes:
        network: that was called.
        args: of the call, detached.
        kwargs: of the call, detached.
        weights: whether gradients flow into its weights.
        inputs: whether gradients flow into its first tensor.
        tangent: whether it was differentiated forwards.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: bool
    inputs: bool
    tangent: bool

    @property
    def kind(self) -> str:
        """What it costs, in words."""
        gradient = [what for what, there in (("weights", self.weights), ("input", self.inputs)) if there]
        forward = "jvp" if self.tangent else "forward"
        return f"{forward} + backward to {' and '.join(gradient)}" if gradient else forward

    def again(self) -> None:
        """The same call with the same gradients, of a plain sum."""
        trained = self.weights or self.inputs
        args, kwargs = self._fresh(self.args), self._fresh(self.kwargs)
        with torch.set_grad_enabled(trained):
            out = self._forward(args, kwargs)
            if trained:
                torch.autograd.backward(out.sum())
        for parameter in self.network.parameters():
            parameter.grad = None

    def _fresh(self, values: Any) -> Any:
        """Copies that gather gradients where the call's did."""

        def leaf(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            return value.detach().requires_grad_() if floating and self.inputs else value

        return tree_map(leaf, values)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not self.tangent:
            return self.network(*args, **kwargs)[0]
        leaves = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.is_floating_point()]
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())

        def call(*moved: Tensor) -> Tensor:
            given = iter(moved)
            put = [next(given) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args]
            named = {
                k: next(given) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()
            }
            return functional_call(self.network, state, tuple(put), named)[0]

        with sdpa_kernel(SDPBackend.MATH), arithmetic_layer_norm():
            return torch.func.jvp(call, tuple(leaves), tuple(torch.ones_like(v) for v in leaves))[1]


def needs(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """How many samples pass through which kind of evaluation."""
    count: Counter[str] = Counter()
    for one in evaluations:
        tensors = [v for v in [*one.args, *one.kwargs.values()] if isinstance(v, Tensor)]
        count[one.kind] += len(tensors[0])
    return dict(count)


@contextmanager
def recorded(networks: Sequence[nn.Module]) -> Iterator[list[Evaluation]]:
    """Inside, every call of these networks is noted down in the list."""
    found: list[Evaluation] = []

    def note(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)]
        tangent = any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in tensors)
        graph = torch.is_grad_enabled()
        weights = graph and any(p.requires_grad for p in network.parameters())
        inputs = graph and not tangent and any(v.requires_grad and v.ndim > 1 for v in tensors)
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        found.append(Evaluation(network, plain_args, plain_kwargs, weights, inputs, tangent))

    handles = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _plain(value: Any) -> Any:
    """A tensor without graph, and without its dual part."""
    if not isinstance(value, Tensor):
        return value
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.detach().clone()
