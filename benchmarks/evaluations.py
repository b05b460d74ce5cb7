"""The evaluations of networks and heads in a step: recorded while it runs, and run again by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fewstep.models import discriminator
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.heads import Heads
from fewstep.models.norms import arithmetic_layer_norm
from fewstep.models.taps import FeatureTap


@dataclass(frozen=True)
class Setting:
    """What a network computes with besides its arguments.

    Attributes:
        denoiser: whose network it is.
        adapter: that is active.
        scalars: for its added inputs.
        tap: of the features that alone are asked for; None: the output is.
    """

    denoiser: NetworkDenoiser
    adapter: str
    scalars: Mapping[str, Tensor]
    tap: FeatureTap | None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, it is as it was."""
        self.denoiser.adapters.activate(self.adapter)
        self.denoiser.graft.scalars.values = self.scalars
        try:
            yield
        finally:
            self.denoiser.graft.scalars.values = {}


@dataclass(frozen=True)
class Evaluation:
    """One call of a network.

    Attributes:
        network: that was called.
        setting: of a denoiser's network; None of heads.
        args: of the call, detached.
        kwargs: of the call, detached.
        weights: whether gradients flow into its weights.
        inputs: whether gradients flow into its first tensor.
        duals: of all that it was given, in order, whether it was moved by a forward derivative.
        penalised: whether a loss on its gradient is differentiated once more.
    """

    network: nn.Module
    setting: Setting | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: bool
    inputs: bool
    duals: tuple[bool, ...]
    penalised: bool = False

    @property
    def kind(self) -> str:
        """What it costs, in words."""
        gradient = [what for what, there in (("weights", self.weights), ("input", self.inputs)) if there]
        forward = ("heads " if isinstance(self.network, Heads) else "") + ("jvp" if self.tangent else "forward")
        forward += " to features" if self.tap is not None else ""
        backward = "second derivative" if self.penalised else "backward"
        return f"{forward} + {backward} to {' and '.join(gradient)}" if gradient else forward

    @property
    def tap(self) -> FeatureTap | None:
        """Of the features that alone are asked for."""
        return None if self.setting is None else self.setting.tap

    @property
    def tangent(self) -> bool:
        """Whether it was differentiated forwards."""
        return any(self.duals)

    @property
    def trained(self) -> bool:
        """Whether it keeps activations for a backward pass."""
        return self.weights or self.inputs

    @property
    def samples(self) -> int:
        """In its batch."""
        return len(next(v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)))

    def again(self) -> None:
        """The same call with the same gradients, of a plain sum."""
        results = self.results()
        if self.trained:
            torch.autograd.backward(torch.stack([one.sum() for one in results]).sum())
            for parameter in self.network.parameters():
                parameter.grad = None

    def results(self) -> tuple[Tensor, ...]:
        """The call's output, or the features of it, with its graph where gradients flow, and a penalty's gradients."""
        args, kwargs = self._fresh(self.args), self._fresh(self.kwargs)
        out = self._call(args, kwargs)
        if not self.penalised:
            return out
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.requires_grad]
        total = torch.stack([one.sum() for one in out]).sum()
        return *out, *(one.square() for one in torch.autograd.grad(total, inputs, create_graph=True))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        setting = nullcontext() if self.setting is None else self.setting.restored()
        with setting, torch.set_grad_enabled(self.trained):
            if self.tap is not None:
                return self.tap.of(lambda: self.network(*args, **kwargs))
            out = self._jvp(args, kwargs) if self.tangent else self.network(*args, **kwargs)
        return (out if isinstance(out, Tensor) else out[0],)

    def _fresh(self, values: Any) -> Any:
        """Copies that gather gradients where the call's did."""

        def leaf(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            return value.detach().requires_grad_() if floating and self.inputs else value

        return tree_map(leaf, values)

    def _jvp(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The derivative along ones of what was moved in the step."""
        scalars = {} if self.setting is None else dict(self.setting.scalars)
        leaves, shape = tree_flatten((args, kwargs, scalars))
        moved = tuple(leaf for leaf, dual in zip(leaves, self.duals, strict=True) if dual)
        state = dict(self.network.named_parameters()) | dict(self.network.named_buffers())

        def call(*inputs: Tensor) -> Tensor:
            given = iter(inputs)
            mixed = [next(given) if dual else leaf for leaf, dual in zip(leaves, self.duals, strict=True)]
            own_args, own_kwargs, own_scalars = tree_unflatten(mixed, shape)
            if self.setting is not None:
                self.setting.denoiser.graft.scalars.values = own_scalars
            return functional_call(self.network, state, own_args, own_kwargs)[0]

        with sdpa_kernel(SDPBackend.MATH), arithmetic_layer_norm():
            return torch.func.jvp(call, moved, tuple(torch.ones_like(v) for v in moved))[1]


def needs(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """How many samples pass through which kind of evaluation."""
    count: Counter[str] = Counter()
    for one in evaluations:
        count[one.kind] += one.samples
    return dict(count)


@contextmanager
def recorded(parts: Sequence[NetworkDenoiser | Heads]) -> Iterator[list[Evaluation]]:
    """Inside, every call of these denoisers' networks and of these heads is noted down in the list."""
    found: list[Evaluation] = []
    denoisers = {id(part.network): part for part in parts if isinstance(part, NetworkDenoiser)}

    def note(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        duals = tuple(_is_dual(v) for v in tree_leaves((args, kwargs, scalars_of(network))))
        graph = torch.is_grad_enabled()
        weights = graph and any(p.requires_grad for p in network.parameters())
        inputs = graph and not any(duals) and any(v.requires_grad and v.ndim > 1 for v in tensors)
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        found.append(Evaluation(network, setting_of(network), plain_args, plain_kwargs, weights, inputs, duals))

    def setting_of(network: nn.Module) -> Setting | None:
        denoiser = denoisers.get(id(network))
        if denoiser is None:
            return None
        taps = [one.tap for one in parts if isinstance(one, NetworkDenoiser) and one.network is network]
        tap = next((tap for tap in taps if tap is not None and tap.alone), None)
        return Setting(denoiser, denoiser.adapters.active, tree_map(_plain, scalars_of(network)), tap)

    def scalars_of(network: nn.Module) -> dict[str, Tensor]:
        denoiser = denoisers.get(id(network))
        return {} if denoiser is None else dict(denoiser.graft.scalars.values)

    modules = {id(module): module for module in (module_of(part) for part in parts)}
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules.values()]
    try:
        with _penalties_noted(found):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _penalties_noted(found: list[Evaluation]) -> Iterator[None]:
    """Inside, the call of heads whose gradient an exact penalty is about is marked: it is the latest one."""
    exact = discriminator.r1

    def noted(logits: Tensor, inputs: Tensor) -> Tensor:
        found[-1] = replace(found[-1], penalised=True)
        return exact(logits, inputs)

    discriminator.r1 = noted
    try:
        yield
    finally:
        discriminator.r1 = exact


def module_of(part: NetworkDenoiser | Heads) -> nn.Module:
    """The module that is called."""
    return part.network if isinstance(part, NetworkDenoiser) else part


def _is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)


def _plain(value: Any) -> Any:
    """A tensor without graph, and without its dual part."""
    return _unwrapped(value).detach().clone() if isinstance(value, Tensor) else value


def _unwrapped(tensor: Tensor) -> Tensor:
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


@contextmanager
def saved(own: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Inside, bytes that autograd packs away are added up in the list's one number, each storage once.

    Weights of the modules `own` are there anyway and do not count, nor do views of them.
    """
    total = [0]
    seen = {p.untyped_storage().data_ptr() for module in own for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        plain = _unwrapped(tensor)
        if plain._is_zerotensor():  # of a forward derivative: it has no memory
            return tensor
        storage = plain.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
