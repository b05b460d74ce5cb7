"""What a turn does not use waits in the host's memory: moments, averages, and whole networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.shards import is_spread
from fewstep.training.method import Method, Turn
from fewstep.training.optim import PlayerOptimizer


class Place(Protocol):
    """Where tensors wait."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether it waits there."""
        ...

    def put(self, tensor: Tensor) -> Tensor:
        """Its values there."""
        ...

    def take(self, tensor: Tensor) -> Tensor:
        """Its values where they are computed with."""
        ...


@dataclass(frozen=True)
class Host:
    """The host's memory, page-locked, beside a device."""

    device: torch.device

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is not on the device."""
        return tensor.device.type != self.device.type

    def put(self, tensor: Tensor) -> Tensor:
        """A copy; the host waits for it, for others may read it there at once."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def take(self, tensor: Tensor) -> Tensor:
        """A copy on the device, in its own time."""
        return tensor.to(self.device, non_blocking=True)


@dataclass
class Offload:
    """Tensors keep their identity and their values; only their memory changes place, so a run is the same run.

    Which networks a kind of turn calls is seen in its first turn, for which all stay. One that is called nevertheless
    comes back at once.

    Attributes:
        method: whose averages wait while their player does.
        optimizers: whose moments wait while their player does.
        networks: of the run, each once.
        place: where.
        called: the networks that each kind of turn calls, by its name.
    """

    method: Method
    optimizers: Mapping[str, PlayerOptimizer]
    networks: tuple[nn.Module, ...]
    place: Place
    called: dict[str, set[int]] = field(default_factory=dict)
    _turn: str = ""

    def __post_init__(self) -> None:
        for network in self.networks:
            network.register_forward_pre_hook(partial(self._calls, network))

    def begin(self, turn: Turn) -> None:
        """Before a turn: bring back what it trains, put away what it does not use."""
        for name, optimizer in self.optimizers.items():
            self._move(_moments(optimizer), waits=name not in turn.trains)
        trained = {id(self.method.players[name]) for name in turn.trains}
        own = {id(p) for network in self.networks for p in network.parameters()}
        for average in self.method.averages.values():
            shadow = [t for t in average.shadow.values() if id(t) not in own]
            self._move(shadow, waits=id(average.source) not in trained)
        known, self._turn = self.called.get(turn.name), turn.name
        for network in self.networks:
            if known is not None and id(network) not in known:
                self._move(_tensors(network), waits=True)
        self.called.setdefault(turn.name, set())

    def end(self) -> None:
        """After a turn: what is called now, for samples or figures, is not what the turn uses."""
        self._turn = ""

    def _calls(self, network: nn.Module, _module: nn.Module, _args: Any) -> None:
        if self._turn:
            self.called[self._turn].add(id(network))
        self._move(_tensors(network), waits=False)

    @torch.no_grad()
    def _move(self, tensors: Iterable[Tensor], waits: bool) -> None:
        for tensor in tensors:
            if self.place.holds(tensor) != waits:
                tensor.data = self.place.put(tensor.data) if waits else self.place.take(tensor.data)


def offload_to_host(
    method: Method, optimizers: Mapping[str, PlayerOptimizer], networks: Iterable[nn.Module], device: torch.device
) -> Offload:
    """Offloading of a run on `device`.

    Raises:
        UserError: the run is on the CPU, or its networks are spread over processes.
    """
    if device.type == "cpu":
        raise UserError("memory.offload: true given, but this run computes in the host's memory already")
    found = tuple({id(network): network for network in networks}.values())
    if any(is_spread(p) for network in found for p in network.parameters()):
        raise UserError("memory.offload: true given, but the networks are spread over processes; use one of the two")
    return Offload(method, optimizers, found, Host(device))


def _moments(optimizer: PlayerOptimizer) -> Iterator[Tensor]:
    """Adam's, as large as the parameters; the step counts stay."""
    for state in optimizer.adamw.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
