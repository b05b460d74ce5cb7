"""Random draws that do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """Everything the next draws depend on."""

    device: Tensor
    host: Tensor


class Rng:
    """One seeded stream, the same in every process: each draws for the global batch and keeps its own rows.

    So a run on two processes sees the noise of one process with the same global batch, and a checkpoint resumes on
    any number of them. What it costs is `world` times the draws, next to nothing beside a network evaluation.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", rank: int = 0, world: int = 1) -> None:
        self._rank, self._world = rank, world
        self._device = torch.Generator(device).manual_seed(seed)
        self._host = torch.Generator().manual_seed(seed + 1)

    @property
    def device(self) -> torch.device:
        """Where the draws live."""
        return self._device.device

    def _own(self, x: Tensor) -> Tensor:
        rows = x.shape[0] // self._world
        return x[self._rank * rows : (self._rank + 1) * rows]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like` `(B, *)`, at least float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shape = (like.shape[0] * self._world, *like.shape[1:])
        return self._own(torch.randn(shape, generator=self._device, device=self.device, dtype=dtype))

    def uniform(self, batch: int) -> Tensor:
        """`(B,)` float32 in [0, 1)."""
        return self._own(torch.rand(batch * self._world, generator=self._device, device=self.device))

    def integer(self, high: int) -> int:
        """One integer in [0, high) for the whole global batch, drawn on the host: no synchronisation."""
        return int(torch.randint(high, (), generator=self._host))

    def fork(self, own: bool = False) -> torch.Generator:
        """A stream of its own on the device, its seed drawn on the host: the same in every process, or each another."""
        return torch.Generator(self.device).manual_seed(self.integer(2**62) + (self._rank + 1 if own else 0))

    def rows(self, high: int, batch: int) -> Tensor:
        """`(B,)` int64 on the host: rows of a stored set of `high`, drawn with replacement."""
        return self._own(torch.randint(high, (batch * self._world,), generator=self._host))

    def state(self) -> RngState:
        """The state to save."""
        return RngState(self._device.get_state(), self._host.get_state())

    def restore(self, state: RngState) -> None:
        """Go on from a saved state."""
        self._device.set_state(state.device)
        self._host.set_state(state.host)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global stream starts at `seed`: new weights are the same in every process and every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
