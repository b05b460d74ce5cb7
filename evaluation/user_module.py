"""Anybody's module as a feature network."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from fewstep.errors import UserError

from .features import Features, Identity, as_rgb, weights_sha256

PREFIX = "module:"


class ModuleFeatures:
    """The extractor `module:PACKAGE.ATTR`.

    The attribute is an `nn.Module`, or a function or class that makes one without arguments. It is called with
    `(B, 3, H, W)` uint8, as torchmetrics calls such modules, resizes for itself, and gives `(B, D)`, or a map
    `(B, D, ...)` that is flattened.
    """

    classes = None
    text = None
    gives_logits = False

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """`place` is `PACKAGE.ATTR`.

        Raises:
            UserError: it cannot be imported, or is no module.
        """
        self.device = torch.device(device)
        self._network = _module(place).to(self.device).requires_grad_(False).eval()
        self.identity = Identity(f"{PREFIX}{place}", weights_sha256(self._network), 0, "its own")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        values = self._network.eval()(as_rgb(images).to(self.device))
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != len(images):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"features {self.identity.name!r}: gave {found} for {len(images)} images, (B, D) is needed")
        return Features(values.flatten(1).float())


def _module(place: str) -> nn.Module:
    package, _, attribute = place.rpartition(".")
    try:
        made = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"features 'module:{place}': cannot be imported ({error}); the form is module:PACKAGE.ATTR, and the "
            "package must be installed or on PYTHONPATH"
        ) from error
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    if not isinstance(made, nn.Module):
        raise UserError(f"features 'module:{place}': found {type(made).__name__}, a torch module is needed")
    return made
