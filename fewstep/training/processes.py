"""What the processes of one run tell each other."""

from __future__ import annotations

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


def equal_in_all(number: int, device: torch.device) -> bool:
    """Whether all processes have the same `number`; all must ask."""
    if not several():
        return True
    told = torch.tensor([number, -number], device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told[0] == -told[1])


def lost_another(error: RuntimeError) -> bool:
    """Whether an error tells that another process has gone: that of an exchange, by torch or by gloo."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
