"""AdamW with moments of 8 bits, by bitsandbytes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewstep.config import Optim
from fewstep.errors import UserError

_CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def make_8bit(parameters: Sequence[nn.Parameter], config: Optim, lr: float, weight_decay: float) -> Any:
    """The optimizer that `optim.kind` names.

    Raises:
        UserError: bitsandbytes is not installed, or the parameters are not on CUDA.
    """
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise UserError(
            f"optim.kind: {config.kind} given, but bitsandbytes cannot be imported; pip install 'fewstep[bitsandbytes]'"
        ) from error
    device = parameters[0].device.type
    if device != "cuda":
        raise UserError(f"optim.kind: {config.kind} given, but it runs on CUDA only, and this run is on {device}")
    made = getattr(library, _CLASSES[config.kind])
    return made(parameters, lr=lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay)


@torch.no_grad()
def step_unless_bad(optimizer: torch.optim.Optimizer, norm: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Divide the gradients by `scale` and step, unless their norm is not finite: for that the host looks at it."""
    if not bool(norm.isfinite()):
        return
    if scale is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, scale)
    optimizer.step()
