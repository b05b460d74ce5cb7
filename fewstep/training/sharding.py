"""Networks spread over processes (FSDP2): each keeps a part of every tensor, and gathers a block while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.players import Average, Player
from fewstep.models.precision import is_narrow
from fewstep.models.shards import spread_like
from fewstep.training.method import Method

_SUMS = MixedPrecisionPolicy(reduce_dtype=torch.float32)
"""Gradients are added in float32, whatever precision they are kept in."""


def refuse_with_sharding(config: RunConfig) -> None:
    """Settings that sharding does not go with.

    Raises:
        UserError: one of them is given beside `train.shard=full`.
    """
    if config.train.shard == "none":
        return
    for place, is_on in {
        "train.compile": config.train.compile != "none",
        "train.compile_players": any(mode != "none" for mode in config.train.compile_players.values()),
        "optim.kind": config.optim.kind != "adamw",
        "memory.offload": config.memory.offload,
        "memory.teacher": config.memory.teacher != "float32",
    }.items():
        if is_on:
            raise UserError(f"train.shard: full given, with {place}; leave one of them out")


def denoisers(values: Iterable[object]) -> Iterator[NetworkDenoiser]:
    """The network denoisers among `values` and in the dataclasses among them, such as a discriminator's backbone."""
    for value in values:
        if isinstance(value, NetworkDenoiser):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from denoisers(getattr(value, one.name) for one in fields(value))


def shard(method: Method, found: Iterable[NetworkDenoiser], device: torch.device, world: int) -> None:
    """Spread a method's networks over all processes, with its players and averages, in place.

    A network whose features are tapped stays whole in every process, and its gradients are averaged as without
    sharding: FSDP2 gathers a gradient at the network's own output, which a loss on features does not touch. Where
    weights are in bfloat16, what stayed in float32 (norms, embeddings) is whole in every process too: FSDP2 keeps one
    precision.

    Args:
        method: whose players and averages follow their networks.
        found: all denoisers of the run.
        device: of the networks.
        world: number of processes.
    """
    held = list(found)
    tapped = {id(one.network) for one in held if one.tap is not None}
    networks = {id(one.network): one for one in held if id(one.network) not in tapped}
    mesh = init_device_mesh(device.type, (world,))
    new: dict[int, nn.Parameter] = {}
    old: list[nn.Parameter] = []  # kept until the end: an id is of a living object only
    for one in networks.values():
        before = dict(one.network.named_parameters())
        _contiguous(one.network)
        narrow = any(is_narrow(p) for p in before.values())
        beside = {p for p in before.values() if narrow and not is_narrow(p)}
        for part in (*_blocks(one.network, one.family), one.network):
            # The outermost part too is given up after its forward pass: one that stays gathered does not hear whether
            # its weights train now.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=_SUMS, ignored_params=beside)
        after = dict(one.network.named_parameters())
        old += before.values()
        new |= {id(before[name]): after[name] for name in before}
    players = {id(player): Player(_moved(player.parameters, new)) for player in _players(method)}
    method.averages = {name: _average(one, players[id(one.source)], new) for name, one in method.averages.items()}
    method.players = {name: players[id(player)] for name, player in method.players.items()}


def _players(method: Method) -> Iterator[Player]:
    yield from method.players.values()
    yield from (average.source for average in method.averages.values())


def _moved(parameters: Mapping[str, nn.Parameter], new: Mapping[int, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: new.get(id(parameter), parameter) for name, parameter in parameters.items()}


def _average(average: Average, source: Player, new: Mapping[int, nn.Parameter]) -> Average:
    """The average that follows `source`: its network's own spread weights, or its tensors cut as those they follow."""
    shadow: dict[str, Tensor] = {
        name: new[id(value)] if id(value) in new else spread_like(value, source.parameters[name])
        for name, value in average.shadow.items()
    }
    return Average(source, average.decay, shadow, average.warmup, average.updates)


def _blocks(network: nn.Module, family: Family) -> list[nn.Module]:
    return [block for name in family.compute_blocks for block in network.get_submodule(name).children()]


def _contiguous(network: nn.Module) -> None:
    """FSDP2 takes no channels-last weights."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
