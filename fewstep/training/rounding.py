"""AdamW on weights that are kept in bfloat16: each step is made in float32 and rounded stochastically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fewstep.models.stretches import stretches
from fewstep.rng import Rng

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Rounded:
    """The leaves of an optimizer that are in bfloat16, and what they are rounded by.

    bfloat16 has 8 bits: an update of less than 1/512 of a weight would be lost for good by rounding to the nearest, and
    so would each fall of the second moment, which loses 1/1000 of itself a step. Rounded up with the probability that
    makes the mean right, none is lost (Zamirai et al. 2020, arXiv 2010.06192).

    Attributes:
        complete: that every process has, and all must round alike.
        parts: this process's of spread parameters, which it rounds for itself.
        rng: the run's.
    """

    complete: tuple[nn.Parameter, ...]
    parts: tuple[nn.Parameter, ...]
    rng: Rng

    def step(self, optimizer: torch.optim.AdamW, scale: Tensor | None, bad: Tensor) -> None:
        """Step the leaves that have gradients, which go; state and settings are the optimizer's.

        Args:
            optimizer: of all leaves.
            scale: `()` that gradients are divided by; None: by nothing.
            bad: `()` 1 where nothing is to move, else 0.
        """
        for leaves, own in ((self.complete, False), (self.parts, True)):
            moving = [leaf for leaf in leaves if leaf.grad is not None]
            generator = self.rng.fork(own) if moving else None
            for stretch in stretches(moving):
                _step(optimizer, stretch, scale, bad, generator)
            for leaf in moving:
                leaf.grad = None


@torch.no_grad()
def _step(
    optimizer: torch.optim.AdamW,
    leaves: list[nn.Parameter],
    scale: Tensor | None,
    bad: Tensor,
    generator: torch.Generator | None,
) -> None:
    """A step by torch's fused kernel on float32 copies. Where it leaves a number alone, rounding does as well."""
    group, states = optimizer.param_groups[0], [_state(optimizer, leaf) for leaf in leaves]
    kept = [leaves, *([state[name] for state in states] for name in _MOMENTS)]
    wide = torch.empty(4, sum(leaf.numel() for leaf in leaves), device=leaves[0].device)
    rows = [_like(row, leaves) for row in wide]
    given = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for row, tensors in zip(rows, [*kept, given], strict=True):
        torch._foreach_copy_(row, tensors)
    beta1, beta2 = group["betas"]
    parameters, moment, second, gradients = rows
    adamw(
        parameters,
        gradients,
        moment,
        second,
        [],
        [state["step"] for state in states],
        fused=True,
        grad_scale=scale,
        found_inf=bad,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    round_stochastically(wide[:3], generator)
    for tensors, row in zip(kept, rows, strict=False):
        torch._foreach_copy_(tensors, row)


def round_stochastically(numbers: Tensor, generator: torch.Generator | None) -> None:
    """Replace each float32 number by one of its two neighbours in bfloat16, so that the mean is the number. In place.

    bfloat16 is the upper half of float32: a random lower half is added, and the lower half of the sum cut off.

    Args:
        numbers: `(*)`, contiguous; what bfloat16 holds exactly stays as it is, infinity too.
        generator: on their device.
    """
    bits = numbers.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    bits &= -(2**16)


def _state(optimizer: torch.optim.AdamW, leaf: nn.Parameter) -> dict[str, Tensor]:
    """The leaf's moments in its own precision and layout, zero before its first step, and its count of steps."""
    state = optimizer.state[leaf]
    if not state:
        state["step"] = torch.zeros((), device=leaf.device)
        state |= {name: torch.zeros_like(leaf, requires_grad=False) for name in _MOMENTS}
    return state


def _like(row: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """A flat tensor cut into views of the leaves' shapes and memory layouts."""
    parts = row.split([leaf.numel() for leaf in leaves])
    return [part.as_strided(leaf.shape, leaf.stride()) for part, leaf in zip(parts, leaves, strict=True)]
