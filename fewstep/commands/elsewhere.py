"""Where a command computes: networks on a device, noise and pictures on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import Process
from fewstep.diffusion.solvers import Denoiser
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition


@dataclass(frozen=True)
class Place:
    """Of networks, text encoders and VAE.

    Attributes:
        device: where they compute.
        rest: whether text encoders and VAE wait in the host's memory.
    """

    device: torch.device
    rest: bool = False

    @staticmethod
    def named(device: str, encoders: str) -> Place:
        """As the command line says it.

        Raises:
            UserError: torch knows no such device, or sees none.
        """
        try:
            there = torch.device(device)
            torch.zeros(1, device=there).item()  # refused by the meta device too
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(f"--device: {device!r} cannot be used ({reason}); cpu always can") from error
        return Place(there, encoders == "host")

    def seen(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser that is here, for inputs on the host."""
        return denoiser if self.device.type == "cpu" else Elsewhere(denoiser, self.device)


HOST = Place(torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A denoiser on another device than its inputs, which come back to where they were: the noise stays the host's."""

    denoiser: Denoiser
    device: torch.device

    @property
    def process(self) -> Process:
        """The denoiser's."""
        return self.denoiser.process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction at `x_t` `(B, *)` and times `t` `(B,)`."""
        made = self.denoiser(x_t.to(self.device), t.to(self.device), condition.to(self.device))
        return replace(made, x_t=x_t, t=t, value=made.value.to(x_t.device))
