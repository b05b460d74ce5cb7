"""Many tensors, a few at a time: copies of them in float32 never take the room of a whole network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

AT_ONCE = 2**24
"""Numbers that are copied at once; a single larger tensor is a stretch by itself."""

Kind = TypeVar("Kind", bound=Tensor)


def stretches(tensors: Sequence[Kind], most: int = AT_ONCE) -> Iterator[list[Kind]]:
    """The tensors in their order, in lists of at most `most` numbers each, or of one tensor."""
    stretch: list[Kind] = []
    size = 0
    for tensor in tensors:
        if stretch and size + tensor.numel() > most:
            yield stretch
            stretch, size = [], 0
        stretch.append(tensor)
        size += tensor.numel()
    if stretch:
        yield stretch


def in_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, in the memory layout of each."""
    copies = [torch.empty_like(one, dtype=torch.float32, requires_grad=False) for one in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
