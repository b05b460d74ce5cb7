"""A time with a cleaner and a noisier neighbour, for objectives that look both ways along a trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.errors import UserError


@dataclass(frozen=True)
class Neighbours:
    """Three flow times on one trajectory.

    Attributes:
        t: `(B,)` in the middle.
        cleaner: `(B,)` at most `t`.
        noisier: `(B,)` at least `t`.
    """

    t: Tensor
    cleaner: Tensor
    noisier: Tensor

    @staticmethod
    def within(reach: float, u: Tensor, down: Tensor, up: Tensor) -> Neighbours:
        """Times u, u − down·min(u, reach) and u + up·min(1 − u, reach) (SCFlow, arXiv 2412.16906).

        Args:
            reach: the largest distance, above 0.
            u: `(B,)` uniform in [0, 1), as are the next two.
            down: `(B,)` share of the way to the cleanest time allowed.
            up: `(B,)` share of the way to the noisiest.

        Raises:
            UserError: `reach` is not positive.
        """
        if not reach > 0:
            raise UserError(f"reach: {reach} given, a positive number needed")
        return Neighbours(u, u - down * u.clamp_max(reach), u + up * (1 - u).clamp_max(reach))
