"""A run's networks made ready for their device: attention, recomputation, storage, compilation. After all are built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fewstep.config import RunConfig
from fewstep.errors import UserError, did_you_mean
from fewstep.models.attention import set_attention
from fewstep.models.compile import Mode, compile_network
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.memory import checkpoint_gradients, store_in
from fewstep.models.players import Player

TEACHER = "teacher"
"""What a config calls the networks that nobody trains."""


def named_networks(
    players: Mapping[str, Player], found: Iterable[NetworkDenoiser]
) -> dict[str, tuple[NetworkDenoiser, ...]]:
    """Denoisers by the players who train in their network, one for each network; those of nobody are the teacher's.

    Adapters on one network make it every one of their players'.
    """
    networks = {id(one.network): one for one in found}
    named: dict[str, tuple[NetworkDenoiser, ...]] = {}
    for one in networks.values():
        own = {id(p) for p in one.network.parameters()}
        names = [name for name, player in players.items() if any(id(p) in own for p in player.parameters.values())]
        for name in names or [TEACHER]:
            named[name] = (*named.get(name, ()), one)
    return named


def prepare_networks(
    config: RunConfig, players: Mapping[str, Player], found: Iterable[NetworkDenoiser], device: torch.device
) -> None:
    """Do with each network what `memory` and `train.compile` say. In place.

    Raises:
        UserError: a network cannot, a name is no player's, or two settings do not go together.
    """
    named = named_networks(players, found)
    networks = {id(one.network): one for group in named.values() for one in group}
    _refuse_pairs(config)
    for one in networks.values():
        set_attention(one.network, config.memory.attention, device)
    for name in config.memory.checkpoint:
        for one in _of(named, name, "memory.checkpoint"):
            checkpoint_gradients(one, name)
    if config.memory.teacher != "float32":
        for one in _of(named, TEACHER, "memory.teacher"):
            store_in(one.network, config.memory.teacher, torch.float32)
    modes: dict[str, Mode] = {**dict.fromkeys(named, config.train.compile), **config.train.compile_players}
    for name in config.train.compile_players:
        _of(named, name, "train.compile_players")
    for key, one in networks.items():
        its: set[Mode] = {
            modes[name] for name, group in named.items() if any(id(other.network) == key for other in group)
        }
        if len(its) > 1:
            text = " and ".join(sorted(its))
            raise UserError(f"train.compile_players: {text} given for players that share one network")
        compile_network(one, its.pop())


def _of(named: Mapping[str, tuple[NetworkDenoiser, ...]], name: str, place: str) -> tuple[NetworkDenoiser, ...]:
    if name not in named:
        text = f"{place}: {name!r} has no network of its own in this run{did_you_mean(name, named)}"
        raise UserError(f"{text}; there are {', '.join(named)}")
    return named[name]


def _refuse_pairs(config: RunConfig) -> None:
    """Settings that each work, but not with each other."""
    modes = {config.train.compile, *config.train.compile_players.values()}
    if "whole" in modes and config.memory.checkpoint:
        raise UserError(
            "train.compile: whole given, with memory.checkpoint; use blocks, which are computed again whole"
        )
    if config.memory.teacher != "float32" and modes != {"none"}:
        raise UserError(f"memory.teacher: {config.memory.teacher} given, with train.compile; leave one of them out")
    if config.memory.attention in ("flash", "sage", "xformers"):
        derivative = config.method.model_dump().get("derivative")
        if derivative == "jvp":
            raise UserError(f"memory.attention: {config.memory.attention} has no forward derivative; "
                            "use method.derivative=central_difference")  # fmt: skip
