"""One AdamW a player, its learning rate a function of the step alone, and gradients averaged over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.config import Optim, PlayerOptim
from fewstep.errors import UserError, did_you_mean
from fewstep.models.players import Player


@dataclass
class Skips:
    """Steps that were left out because a gradient was not finite, counted on the device.

    Attributes:
        total: `()` of this process's run.
        streak: `()` the latest ones without a good one between.
    """

    total: Tensor
    streak: Tensor

    def note(self, norm: Tensor) -> Tensor:
        """Count a step by its gradient's norm; 1 where it is not finite, else 0, as the fused optimizer takes it."""
        bad = (~norm.isfinite()).float()
        self.total += bad
        self.streak = (self.streak + 1) * bad
        return bad


@dataclass(frozen=True)
class PlayerOptimizer:
    """A player's optimizer and its peak learning rate."""

    player: Player
    adamw: torch.optim.AdamW
    lr: float
    skips: Skips

    def step(self, factor: float, clip: float | None) -> Tensor:
        """Average the gradients over processes, clip, step at `factor` × the peak rate; the norm before clipping.

        A gradient that is not finite moves nothing: neither weights nor moments, and the host does not wait to know.
        """
        parameters = [p for p in self.player.parameters.values() if p.grad is not None]
        average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        # What torch's gradient scalers use: the fused kernel reads it on the device.
        self.adamw.found_inf = self.skips.note(norm)  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def forget(self) -> None:
        """Start again with empty moments."""
        self.adamw.state.clear()


def make_optimizers(players: Mapping[str, Player], config: Optim) -> dict[str, PlayerOptimizer]:
    """An optimizer for every player, with the config's overrides.

    Raises:
        UserError: an override names a player that the method does not have.
    """
    for name in config.players:
        if name not in players:
            known = ", ".join(players)
            raise UserError(f"optim.players.{name}: no such player{did_you_mean(name, players)}; players: {known}")
    return {name: _make(player, config, config.players.get(name, PlayerOptim())) for name, player in players.items()}


def _make(player: Player, config: Optim, own: PlayerOptim) -> PlayerOptimizer:
    lr = own.lr if own.lr is not None else config.lr
    decay = own.weight_decay if own.weight_decay is not None else config.weight_decay
    parameters = list(player.parameters.values())
    adamw = torch.optim.AdamW(parameters, lr=lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True)
    zero = torch.zeros((), device=parameters[0].device)
    return PlayerOptimizer(player, adamw, lr, Skips(zero, zero.clone()))


def lr_factor(config: Optim, step: int, steps: int) -> float:
    """The share of the peak learning rate at `step` of `steps`, counted from 0: linear warm-up, then the decay."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = step / steps
    match config.decay:
        case "constant":
            return warm
        case "linear":
            return warm * (1 - done)
        case "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, in one exchange; nothing happens in a single process.

    This is done here, at the optimizer step, instead of by DistributedDataParallel: a distillation step runs
    several networks several times, differentiates through frozen ones and accumulates, and each of these is a known
    way to lose a gradient inside a wrapper without an error.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
