"""What a run will need, found on torch's meta device: its networks have shapes there, and no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fewstep.config import Optim
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.rng import Rng
from fewstep.training.loop import TrainState
from fewstep.training.networks import named_networks
from fewstep.training.sharding import denoisers

_HALVED = {
    nn.functional.linear,
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
    nn.functional.conv_transpose2d,
    nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
}
"""What mixed precision computes in bfloat16 on CUDA."""

_WHOLE = {nn.functional.group_norm, nn.functional.layer_norm, nn.functional.rms_norm, torch.rms_norm,
          nn.functional.softmax, nn.functional.softplus}  # fmt: skip
"""What it computes in float32; all else keeps the precision that it is given."""

_LOOKED_AT = 128
"""Steps at each end of a run, and spread over it, among which the kinds of turns are looked for."""


@dataclass(frozen=True)
class TurnNeeds:
    """One kind of turn.

    Attributes:
        trains: the players that move.
        evaluations: samples through each network, by `network: kind`.
        activations: bytes that autograd holds between forward and backward pass of one micro-batch.
        gradients: bytes of the gradients at its end.
    """

    trains: tuple[str, ...]
    evaluations: Mapping[str, int]
    activations: int
    gradients: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run, and the work of its steps.

    Attributes:
        parameters: bytes of each network, under the names of those who train in it, buffers included.
        other_parameters: bytes of what is trained beside networks: heads, weights of noise levels.
        optimizer: bytes of each player's moments and step counts, once each has moved.
        averages: bytes of each average, those of a network of its own left out.
        turns: by name.
        resident: bytes of weights, moments and averages.
        peak: `resident` and the most that a turn adds.
    """

    parameters: Mapping[str, int]
    other_parameters: int
    optimizer: Mapping[str, int]
    averages: Mapping[str, int]
    turns: Mapping[str, TurnNeeds]
    resident: int
    peak: int


def footprint(state: TrainState, optim: Optim) -> Footprint:
    """Of a run whose networks are on the meta device, at the size of its micro-batch, with these optimizers.

    Random choices of how much to compute, such as the length of a rollout, are taken at their largest.
    """
    found = list(denoisers(vars(state.method).values()))
    named = named_networks(state.method.players, found)
    labels = {id(one.network): one.network for group in named.values() for one in group}
    names = {key: _label(named, network) for key, network in labels.items()}
    parameters = {names[key]: _bytes([*net.parameters(), *net.buffers()]) for key, net in labels.items()}
    inside = {id(p) for network in labels.values() for p in network.parameters()}
    trained = [p for player in state.method.players.values() for p in player.parameters.values()]
    beside = _bytes(p for p in trained if id(p) not in inside)
    optimizer = {name: _moments(player.parameters.values(), optim) for name, player in state.method.players.items()}
    averages = {
        name: _bytes(t for t in one.shadow.values() if id(t) not in inside)
        for name, one in state.method.averages.items()
    }
    turns = {name: _turn(state, step, labels.values(), names) for name, step in _kinds(state).items()}
    resident = sum(parameters.values()) + beside + sum(optimizer.values()) + sum(averages.values())
    peak = resident + max(one.activations + one.gradients for one in turns.values())
    return Footprint(parameters, beside, optimizer, averages, turns, resident, peak)


class remembered_numbers(TorchDispatchMode):
    """Inside, a single number that is sent to the meta device can still be read: the null label, a time's end."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: dict[int, tuple[Tensor, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = args[0] if args else None
        if not isinstance(source, Tensor):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and id(source) in self._sent:
            return self._sent[id(source)][1]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.is_meta and source.numel() == 1 and not source.is_meta:
            self._sent[id(out)] = (out, source.item())
        return out


def _label(named: Mapping[str, Sequence[NetworkDenoiser]], network: nn.Module) -> str:
    """Who trains in a network; those that nobody trains are numbered from the second on."""
    names = [name for name, group in named.items() if any(one.network is network for one in group)]
    place = next(i for i, one in enumerate(named[names[0]]) if one.network is network)
    return "+".join(names) + (f" {place + 1}" if place else "")


def _bytes(tensors: Iterable[Tensor]) -> int:
    once = {id(t): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in once.values())


def _moments(parameters: Iterable[Tensor], optim: Optim) -> int:
    """Two moments like the tensor and a count for each; or two bytes a number, and a float32 for each 256 of them."""
    found = list(parameters)
    if optim.kind == "adamw":
        return sum(2 * p.numel() * p.element_size() + 4 for p in found)
    return sum(2 * p.numel() + 2 * 4 * -(-p.numel() // 256) for p in found)


def _kinds(state: TrainState) -> dict[str, int]:
    """The first step seen of each kind of turn: among the first, the last, and some spread over the run."""
    kinds: dict[str, int] = {}
    steps = state.config.train.steps
    ends = {*range(min(_LOOKED_AT, steps)), *range(max(0, steps - _LOOKED_AT), steps)}
    for step in sorted({*ends, *range(0, steps, max(1, steps // _LOOKED_AT))}):
        kinds.setdefault(state.method.turn(step).name, step)
    return kinds


def _turn(state: TrainState, step: int, networks: Iterable[nn.Module], names: Mapping[int, str]) -> TurnNeeds:
    """The loss of one micro-batch, computed without numbers."""
    turn = state.method.turn(step)
    for name, player in state.method.players.items():
        player.require_grad(name in turn.trains)
    batch = state.next_batch().to("meta")
    weights = [p for network in networks for p in network.parameters()]
    with ExitStack() as stack:
        calls = stack.enter_context(_counted(networks, names))
        held = stack.enter_context(_saved(weights))
        stack.enter_context(_Kernels(state.config.train.precision != "fp32"))
        turn.loss(batch, _rng(state))
    trained = [p for name in turn.trains for p in state.method.players[name].parameters.values()]
    return TurnNeeds(turn.trains, dict(calls), held[0], _bytes(trained))


@contextmanager
def _counted(networks: Iterable[nn.Module], names: Mapping[int, str]) -> Iterator[Counter[str]]:
    """Samples through each network, inside, by what is done with them."""
    count: Counter[str] = Counter()

    def note(network: nn.Module, args: Any, kwargs: Any) -> None:
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        gradient = torch.is_grad_enabled() and (
            any(p.requires_grad for p in network.parameters()) or any(v.requires_grad for v in given)
        )
        kind = "jvp" if any(is_functorch_wrapped_tensor(v) for v in given) else "forward"
        count[f"{names[id(network)]}: {kind}{' and backward' if gradient else ''}"] += len(given[0])

    handles = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _saved(weights: Iterable[Tensor]) -> Iterator[list[int]]:
    """Bytes that autograd packs away inside, each storage once, weights left out."""
    total = [0]
    seen: dict[int, Any] = {s._cdata: s for s in (w.untyped_storage() for w in weights)}

    def pack(tensor: Tensor) -> Tensor:
        plain = tensor
        while is_functorch_wrapped_tensor(plain):
            plain = get_unwrapped(plain)
        if plain._is_zerotensor():
            return tensor
        storage = plain.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


class _Kernels(TorchFunctionMode):
    """What the meta device lacks: attention that keeps no matrix of weights, and mixed precision."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        plain = peek_interpreter_stack() is None  # else a forward derivative, in full precision
        if self.mixed and plain and func in _HALVED:
            args, words = tree_map(partial(_cast, torch.bfloat16), (args, words))
        if self.mixed and plain and func in _WHOLE:
            args, words = tree_map(partial(_cast, torch.float32), (args, words))
        if plain and func is nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(words[k] for k in ("query", "key", "value")[len(args) :]))[:3]
            return _Attention.apply(query, key, value)
        return func(*args, **words)


def _cast(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention kernel: it keeps its inputs, its output, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


@dataclass(frozen=True)
class _Draws:
    """A run's random stream without values on the device; integers are the largest, and rows of stored sets real."""

    host: Rng
    device: torch.device

    def normal(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, device=self.device, dtype=torch.promote_types(like.dtype, torch.float32))

    def uniform(self, batch: int) -> Tensor:
        return torch.empty(batch, device=self.device)

    def integer(self, high: int) -> int:
        return high - 1

    def rows(self, high: int, batch: int) -> Tensor:
        return self.host.rows(high, batch)


def _rng(state: TrainState) -> Rng:
    return cast(Rng, _Draws(Rng(state.config.run.seed), torch.device("meta")))
