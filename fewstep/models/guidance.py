"""Guidance of a teacher: x̂ = x̂_∅ + s·(x̂_c − x̂_∅), with both predictions in one batched pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process, expand
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition


@dataclass(frozen=True)
class Guided:
    """A denoiser under classifier-free guidance (Ho & Salimans 2022, in the convention that s = 1 is off).

    Attributes:
        denoiser: predicts with and without the condition.
        null: the null condition, of one sample; needed for every scale but 1.
        scale: s, one for all or one a sample `(B,)`.

    Raises:
        UserError: a scale other than 1 without a null condition.
    """

    denoiser: Denoiser
    null: Condition | None
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.null is None and not self._off():
            raise UserError(f"teacher.guidance: {self.scale} needs a conditional teacher; this one takes 1.0 only")

    def _off(self) -> bool:
        return not isinstance(self.scale, Tensor) and self.scale == 1.0

    @property
    def process(self) -> Process:
        """The denoiser's."""
        return self.denoiser.process

    def at(self, scale: Tensor) -> Guided:
        """The same teacher under other scales, one a sample `(B,)`."""
        return replace(self, scale=scale)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The guided prediction at `x_t` `(B, *)` and times `t` `(B,)`.

        Guidance is the same in every linear parametrisation, so it acts on the network's own output.
        """
        if self._off():
            return self.denoiser(x_t, t, condition)
        assert self.null is not None
        both = Condition.cat([condition, condition.nulled(self.null, len(x_t))])
        out = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, unconditional = out.value.chunk(2)
        s = expand(self.scale, x_t) if isinstance(self.scale, Tensor) else self.scale
        return Prediction(out.process, x_t, t, unconditional + s * (conditional - unconditional), out.kind)
