"""One AdamW a player, its learning rate a function of the step alone, and gradients averaged over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.config import Optim, PlayerOptim
from fewstep.errors import UserError, did_you_mean
from fewstep.models.players import Player
from fewstep.models.precision import is_narrow
from fewstep.models.shards import is_spread, local
from fewstep.models.stretches import stretches
from fewstep.rng import Rng
from fewstep.training.eight_bits import make_8bit, step_unless_bad
from fewstep.training.rounding import Rounded

_EXCHANGED = 2**27
"""Numbers of gradients that processes exchange at once: half a gigabyte."""


@dataclass
class Skips:
    """Steps that were left out because a gradient was not finite, counted on the device.

    Attributes:
        total: `()` of the run.
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

    def read(self) -> list[int]:
        """Both counts; this waits for the device."""
        return [int(self.total), int(self.streak)]

    def restore(self, total: int, streak: int) -> None:
        """Go on from earlier counts."""
        self.total.fill_(total)
        self.streak.fill_(streak)


@dataclass(frozen=True)
class PlayerOptimizer:
    """A player's optimizer and its peak learning rate.

    Attributes:
        player: whose parameters move.
        adamw: of `leaves`.
        lr: at the peak.
        skips: the steps that were left out.
        leaves: what AdamW moves, by name: the parameters themselves, or this process's parts of spread ones.
        fused: whether it is torch's fused one, which reads on the device whether to step; another's asks the host.
        rounded: the leaves in bfloat16; None: there are none.
    """

    player: Player
    adamw: torch.optim.AdamW
    lr: float
    skips: Skips
    leaves: Mapping[str, nn.Parameter]
    fused: bool = True
    rounded: Rounded | None = None

    def step(self, factor: float, clip: float | None) -> Tensor:
        """Average the gradients over processes, clip, step at `factor` × the peak rate; the norm before clipping.

        A gradient that is not finite moves nothing: neither weights nor moments, and the host does not wait to know.
        """
        parts = self._take_parts()
        complete = [p for p in self.player.parameters.values() if p.grad is not None]
        parameters = complete + parts
        if not parameters:  # the turn's loss did not reach this player, so it does not move
            return torch.zeros_like(self.skips.total)
        average_gradients(complete)
        norm = gradient_norm(complete, parts)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        scale, bad = None if clip is None else (norm / clip).clamp_min(1), self.skips.note(norm)
        if self.fused:
            # What torch's gradient scalers use: the kernel reads both on the device, and divides as it goes.
            self.adamw.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
            self.adamw.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            if self.rounded is not None:
                self.rounded.step(self.adamw, scale, bad)
            self.adamw.step()
        else:
            step_unless_bad(self.adamw, norm, scale)
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _take_parts(self) -> list[nn.Parameter]:
        """Move the gradients of spread parameters, which are averaged already, to the leaves that are their parts."""
        taken = []
        for name, parameter in self.player.parameters.items():
            if is_spread(parameter) and parameter.grad is not None:
                leaf = self.leaves[name]
                leaf.grad, parameter.grad = local(parameter.grad), None
                taken.append(leaf)
        return taken

    def forget(self) -> None:
        """Start again with empty moments."""
        self.adamw.state.clear()


def make_optimizers(players: Mapping[str, Player], config: Optim, rng: Rng | None = None) -> dict[str, PlayerOptimizer]:
    """An optimizer for every player, with the config's overrides.

    Args:
        players: by name.
        config: of the run.
        rng: what weights in bfloat16 are rounded by; needed where there are some.

    Raises:
        UserError: an override names a player that the method does not have.
    """
    for name in config.players:
        if name not in players:
            known = ", ".join(players)
            raise UserError(f"optim.players.{name}: no such player{did_you_mean(name, players)}; players: {known}")
    own = {name: config.players.get(name, PlayerOptim()) for name in players}
    return {name: _make(player, config, own[name], rng) for name, player in players.items()}


def _make(player: Player, config: Optim, own: PlayerOptim, rng: Rng | None) -> PlayerOptimizer:
    lr = own.lr if own.lr is not None else config.lr
    decay = own.weight_decay if own.weight_decay is not None else config.weight_decay
    leaves = {name: _leaf(parameter) for name, parameter in player.parameters.items()}
    parameters = list(leaves.values())
    fused = config.kind == "adamw"
    if fused:
        adamw = torch.optim.AdamW(parameters, lr=lr, betas=config.betas, eps=config.eps, weight_decay=decay, fused=True)
    else:
        adamw = make_8bit(parameters, config, lr, decay)
    zero = torch.zeros((), device=parameters[0].device)
    return PlayerOptimizer(player, adamw, lr, Skips(zero, zero.clone()), leaves, fused, _rounded(player, leaves, rng))


def _rounded(player: Player, leaves: Mapping[str, nn.Parameter], rng: Rng | None) -> Rounded | None:
    narrow = {name: leaf for name, leaf in leaves.items() if is_narrow(leaf)}
    if not narrow:
        return None
    assert rng is not None, "weights in bfloat16 are rounded by a random stream"
    spread = {name for name in narrow if is_spread(player.parameters[name])}
    complete, parts = (tuple(leaf for name, leaf in narrow.items() if (name in spread) == own) for own in (False, True))
    return Rounded(complete, parts, rng)


def _leaf(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local(parameter)) if is_spread(parameter) else parameter


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


def gradient_norm(complete: Sequence[nn.Parameter], parts: Sequence[nn.Parameter]) -> Tensor:
    """The norm `()` over all gradients: of parameters that every process has, and of this process's parts of others."""
    gradients = [p.grad for p in complete if p.grad is not None]
    if not parts:
        return _norm(gradients)
    squared = _norm([p.grad for p in parts if p.grad is not None]).square()
    dist.all_reduce(squared)
    if not gradients:  # a zero made on the host would be sent, and waited for
        return squared.sqrt()
    return (squared + _norm(gradients).to(squared).square()).sqrt()


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Summed in float32 at least, whatever they are kept in, each precision in one call."""
    wide, narrow = [g for g in gradients if not is_narrow(g)], [g for g in gradients if is_narrow(g)]
    norms = [*torch._foreach_norm(wide, 2)] if wide else []
    norms += torch._foreach_norm(narrow, 2, torch.float32) if narrow else ()
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over processes, taken in float32; nothing happens in a single process.

    This is done here, at the optimizer step, instead of by DistributedDataParallel: a distillation step runs
    several networks several times, differentiates through frozen ones and accumulates, and each of these is a known
    way to lose a gradient inside a wrapper without an error.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for stretch in stretches(gradients, _EXCHANGED):
        flat = torch.cat([g.reshape(-1) for g in stretch]).float()
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in stretch])
        torch._foreach_copy_(stretch, [part.view_as(g) for part, g in zip(parts, stretch, strict=True)])
