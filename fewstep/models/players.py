"""Who is trained, and whose weights follow: players and averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.models.shards import is_spread, local
from fewstep.models.stretches import in_float32, stretches


@dataclass(frozen=True)
class Player:
    """Parameters with an optimizer of their own, which move only at the turns that name the player."""

    parameters: Mapping[str, nn.Parameter]

    @staticmethod
    def of(module: nn.Module) -> Player:
        """All parameters of a module."""
        return Player(dict(module.named_parameters()))

    def require_grad(self, flag: bool) -> None:
        """Let gradients flow into the parameters, or not."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(flag)


@dataclass
class Average:
    """An exponential moving average of a player's parameters, kept in float32.

    Attributes:
        source: the player that is followed.
        decay: of the old average per update.
        shadow: the averaged values, by parameter name: parameters of a target network, or tensors of its own.
        warmup: start with the decay (1+n)/(10+n) at update n, so that early weights are forgotten sooner.
        updates: how often the average moved.
    """

    source: Player
    decay: float
    shadow: Mapping[str, Tensor]
    warmup: bool = True
    updates: int = 0

    def __post_init__(self) -> None:
        self._shadow = [local(self.shadow[name]) for name in self.source.parameters]
        self._source = [local(p) for p in self.source.parameters.values()]

    @staticmethod
    def of(source: Player, decay: float, warmup: bool = True) -> Average:
        """An average with tensors of its own, starting at the player's present weights."""
        shadow = {name: p.detach().float().clone() for name, p in source.parameters.items()}
        return Average(source, decay, shadow, warmup)

    @torch.no_grad()
    def update(self) -> None:
        """Shadow ← decay·shadow + (1 − decay)·source."""
        early = (1 + self.updates) / (10 + self.updates)
        decay = min(self.decay, early) if self.warmup else self.decay
        if any(p.dtype != torch.float32 for p in self._source):
            self._follow_narrow(1 - decay)
        else:
            torch._foreach_lerp_(self._shadow, self._source, 1 - decay)
        self.updates += 1

    def _follow_narrow(self, share: float) -> None:
        """The same where the source is kept in fewer bits, by float32 copies of a stretch of it at a time."""
        shadows = iter(self._shadow)
        for stretch in stretches(self._source):
            torch._foreach_lerp_([next(shadows) for _ in stretch], in_float32(stretch), share)

    @torch.no_grad()
    def restart(self) -> None:
        """The average is the player's present weights."""
        torch._foreach_copy_(self._shadow, self._source)
        self.updates = 0

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the player's parameters hold the averaged values."""
        spread = {name: local(p) for name, p in self.source.parameters.items() if is_spread(p)}
        saved = {name: part.clone() for name, part in spread.items()}  # a spread parameter is gathered from its part
        kept = {name: p.data for name, p in self.source.parameters.items() if name not in spread}
        for name, part in spread.items():
            part.copy_(local(self.shadow[name]))
        for name in kept:
            parameter = self.source.parameters[name]
            parameter.data = self.shadow[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, part in spread.items():
                part.copy_(saved[name])
            for name, value in kept.items():
                self.source.parameters[name].data = value
