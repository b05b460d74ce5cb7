"""What an average velocity must satisfy to be the flow map of an ODE, as residuals that vanish for the exact map.

Boffi et al. 2025 (arXiv 2505.18825), on the path and with the letters of `fewstep.models.two_time`: the map is
X_{t→r}(x) = x + (r − t)·u(x, t, r), t is the noisier end, and every residual is a velocity `(B, *)`. Each names the
part that learns; the rest carries no gradient. The Lagrangian and the Eulerian one differentiate a forward derivative,
for which the layer norms of a network have to be computed in plain arithmetic; they see to that themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.diffusion.derivative import along, forward_derivative
from fewstep.diffusion.process import expand
from fewstep.models.norms import arithmetic_layer_norm
from fewstep.models.two_time import advance

Average = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(x, t, r) `(B, *)` of `x` `(B, *)` and times `t`, `r` `(B,)`."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""The ODE's own velocity v(x, t) `(B, *)` at `x` `(B, *)` and times `t` `(B,)`."""


def lagrangian(average: Average, velocity: Velocity, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """∂_r X_{t→r}(x) − sg v(X_{t→r}(x), r): the end of a jump moves along the ODE (LSD).

    Only the derivative with respect to the end learns, and no derivative passes through x or t. One differentiable
    evaluation of u and one of v without a graph.
    """

    def end(r: Tensor) -> Tensor:
        return advance(x, t, r, average(x, t, r))

    with arithmetic_layer_norm():
        moved = forward_derivative(end, (r,), (torch.ones_like(r),))
    with torch.no_grad():
        there = velocity(moved.value.detach(), r)
    return moved.slope - there


def eulerian(average: Average, velocity: Velocity, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """∂_t X_{t→r}(x) + sg(∇X_{t→r}(x)·v(x, t)): the end of a jump stays while its start moves along the ODE (ESD).

    The derivative with respect to the start learns, the spatial one does not. Two evaluations of u, one of v.
    """

    def of_start(t: Tensor) -> Tensor:
        return advance(x, t, r, average(x, t, r))

    def of_place(x: Tensor) -> Tensor:
        return advance(x, t, r, average(x, t, r))

    with arithmetic_layer_norm():
        moved = forward_derivative(of_start, (t,), (torch.ones_like(t),))
    with torch.no_grad():
        here = velocity(x, t)
    return moved.slope + along(of_place, (x,), (here,)).slope


def progressive(average: Average, x: Tensor, t: Tensor, r: Tensor, share: Tensor) -> Tensor:
    """u(x, t, r) − sg(h·u(x, t, q) + (1 − h)·u(X_{t→q}(x), q, r)): one jump is two (PSD), q = t + h·(r − t).

    Args:
        average: u.
        x: `(B, *)` at times `t`.
        t: `(B,)` where the jumps start.
        r: `(B,)` where they end.
        share: `(B,)` h, the part of the way that is gone in the first jump; ½ is the midpoint.
    """
    with torch.no_grad():
        q, h = t + share * (r - t), expand(share, x).to(x)
        first = average(x, t, q)
        target = h * first + (1 - h) * average(advance(x, t, q, first), q, r)
    return average(x, t, r) - target


def mean_square(residual: Tensor) -> Tensor:
    """The mean square of each sample's residual `(B, *)`, `(B,)`."""
    return residual.square().flatten(1).mean(1)
