"""A tensor of which every process keeps a part, seen as that part or as the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@dataclass(frozen=True)
class Box:
    """A piece of a tensor by its place in the whole.

    Attributes:
        start: its first index in each dimension.
        size: its length in each dimension.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def count(self) -> int:
        """Number of its elements."""
        return prod(self.size)

    def common(self, other: Box) -> Box:
        """What both hold; nothing may be left of it."""
        start = tuple(map(max, self.start, other.start))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True))
        return Box(start, tuple(max(end - begin, 0) for end, begin in zip(ends, start, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The indices of this box in a tensor that holds `outer`."""
        begins = (own - there for own, there in zip(self.start, outer.start, strict=True))
        return tuple(slice(begin, begin + length) for begin, length in zip(begins, self.size, strict=True))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a spread tensor, outside every graph and on the same memory; another tensor itself."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else tensor


def box(tensor: Tensor) -> Box:
    """Where this process's part lies in a spread tensor; all of another."""
    start, size = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        for number, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):  # cut as by `torch.chunk`: the last processes may have less, or nothing
                length = size[placement.dim]
                each = -(-length // tensor.device_mesh.size(number))
                begin = min(tensor.device_mesh.get_local_rank(number) * each, length)
                start[placement.dim] += begin
                size[placement.dim] = min(each, length - begin)
    found = Box(tuple(start), tuple(size))
    assert found.size == tuple(local(tensor).shape), "cut in another way"
    return found


def is_spread(tensor: Tensor) -> bool:
    """Whether every process keeps a part only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; where it is spread, all processes must ask."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def rows_to_ask(own: Tensor, network: nn.Module) -> Tensor:
    """The rows `(n,)` of a batch that a network is asked about: `own`; of a spread one row 0 where these are none.

    Processes gather a spread network's blocks together: one that left out an evaluation would keep the others waiting.
    """
    if len(own) or not any(map(is_spread, network.parameters())):
        return own
    return own.new_zeros(1)


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
