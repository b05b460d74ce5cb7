"""A tensor of which every process keeps a part, seen as that part or as the whole."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a spread tensor, outside every graph and on the same memory; another tensor itself."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether every process keeps a part only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; where it is spread, all processes must ask."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, cut as `like` is; itself where that is not spread. Nothing is exchanged."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The whole whose part this process has, cut as `like` is; `part` itself where that is not spread."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
