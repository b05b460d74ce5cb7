"""A run's networks made ready for their device: attention, recomputation, storage, compilation. After all are built."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from fewstep.config import RunConfig
from fewstep.errors import UserError, did_you_mean
from fewstep.models.attention import set_attention
from fewstep.models.compile import Mode, compile_network
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.memory import checkpoint_gradients, store_in
from fewstep.models.players import Average, Player
from fewstep.models.precision import keep_in_bfloat16, keep_times

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
    config: RunConfig,
    players: Mapping[str, Player],
    found: Iterable[NetworkDenoiser],
    device: torch.device,
    averages: Iterable[Average] = (),
) -> None:
    """Do with each network what `memory`, `train.precision` and `train.compile` say. In place.

    Args:
        config: of the run.
        players: by name.
        found: all denoisers of the run.
        device: of the run.
        averages: whose tensors stay in float32, those of target networks too.

    Raises:
        UserError: a network cannot, a name is no player's, or two settings do not go together.
    """
    named = named_networks(players, found)
    held = {id(one.network): one for group in named.values() for one in group}
    _refuse_pairs(config)
    _refuse_graphs(config, device)
    for one in held.values():
        set_attention(one.network, config.memory.attention, device)
        if config.train.precision != "fp32":
            keep_times(one.network, one.family)
    for name in config.memory.checkpoint:
        for one in _of(named, name, "memory.checkpoint"):
            checkpoint_gradients(one, name)
    followers = {id(tensor) for one in averages for tensor in one.shadow.values()}
    stored = _store_teacher(config, named, followers)
    if config.train.precision == "bf16_weights":
        for key in held.keys() - stored:
            keep_in_bfloat16(held[key].network, held[key].family, followers)
    _compile(config, named)


def _store_teacher(
    config: RunConfig, named: Mapping[str, tuple[NetworkDenoiser, ...]], followers: Collection[int]
) -> set[int]:
    """Keep what nobody trains, and no average moves, in fewer bits; the ids of those networks."""
    if config.memory.teacher == "float32":
        return set()
    networks = [one.network for one in _of(named, TEACHER, "memory.teacher")]
    resting = [network for network in networks if not any(id(p) in followers for p in network.parameters())]
    for network in resting:
        store_in(network, config.memory.teacher, torch.float32)
    return {id(network) for network in resting}


def _compile(config: RunConfig, named: Mapping[str, tuple[NetworkDenoiser, ...]]) -> None:
    modes: dict[str, Mode] = {**dict.fromkeys(named, config.train.compile), **config.train.compile_players}
    for name in config.train.compile_players:
        _of(named, name, "train.compile_players")
    networks = {id(one.network): one for group in named.values() for one in group}
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
    modes, memory = config.train.compile_modes, config.memory
    for mode in sorted(modes & {"whole", "graphs"}):
        if memory.checkpoint:
            raise UserError(
                f"train.compile: {mode} given, with memory.checkpoint; use blocks, which are computed again whole"
            )
    if memory.teacher != "float32" and modes != {"none"}:
        raise UserError(f"memory.teacher: {memory.teacher} given, with train.compile; leave one of them out")
    if config.train.precision == "bf16_weights" and memory.teacher == "bfloat16":
        raise UserError("memory.teacher: bfloat16 given, but train.precision=bf16_weights keeps it so; leave it out")
    if config.train.precision == "bf16_weights" and config.optim.kind != "adamw":
        raise UserError(f"train.precision: bf16_weights given, with optim.kind={config.optim.kind}, which rounds to "
                        "the nearest; leave one of them out")  # fmt: skip
    if memory.attention in ("flash", "sage", "xformers"):
        derivative = config.method.model_dump().get("derivative")
        if derivative == "jvp":
            raise UserError(f"memory.attention: {memory.attention} has no forward derivative; "
                            "use method.derivative=central_difference")  # fmt: skip


def _refuse_graphs(config: RunConfig, device: torch.device) -> None:
    """A recorded graph finds weights where they were, and gradients gone, when it runs again."""
    if "graphs" not in config.train.compile_modes:
        return
    if config.memory.offload:
        raise UserError("train.compile: graphs given, with memory.offload, which moves weights; leave one of them out")
    if config.train.accumulate > 1:
        raise UserError(f"train.compile: graphs given, with train.accumulate={config.train.accumulate}; use whole")
    if device.type != "cuda":
        raise UserError(f"train.compile: graphs given, which CUDA alone records, and this run is on {device.type}")
