"""From the host to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; the host goes on at once.

    A copy from ordinary memory would hold the host until the device has done all that was asked of it before, so what
    goes to CUDA goes by pinned memory, which torch keeps and uses again.
    """
    there = torch.device(device)
    if there.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(there, non_blocking=True)
