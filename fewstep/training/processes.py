"""What the processes of one run tell each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def true_in_any(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; all must ask, and none goes on before all have."""
    if not several():
        return flag
    told = torch.tensor(float(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def told_by_all(text: str, device: torch.device) -> list[str]:
    """What every process tells, by rank; all must tell, and none goes on before all have.

    Bytes are exchanged, not objects: torch would pickle those.
    """
    if not several():
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device))
    longest = max(1, *(int(size) for size in sizes))
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    told = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(told, padded)
    return [bytes(one[: int(size)].tolist()).decode() for one, size in zip(told, sizes, strict=True)]


def own_share(work: Sequence[str]) -> Sequence[str]:
    """What of `work`, the same in all processes, this one does."""
    return work[dist.get_rank() :: dist.get_world_size()] if several() else work


def lost_another(error: RuntimeError) -> bool:
    """Whether an error tells that another process has gone: that of an exchange, by torch or by gloo."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
