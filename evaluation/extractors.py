"""Feature networks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewstep.errors import UserError, did_you_mean

from .classifier import shipped_classifier
from .efficientnet import Lite0Features
from .features import Extractor

_MAKERS: dict[str, Callable[[torch.device | str], Extractor]] = {
    "classifier": shipped_classifier,
    "efficientnet-lite0": Lite0Features,
}


def extractor_names() -> tuple[str, ...]:
    """Every name that `extractor` takes."""
    return tuple(_MAKERS)


def extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The feature network called `name`, on `device`.

    Raises:
        UserError: no such name, or its weights are not installed.
    """
    if name not in _MAKERS:
        raise UserError(
            f"features: none is named {name!r}, allowed are {', '.join(_MAKERS)}{did_you_mean(name, _MAKERS)}"
        )
    return _MAKERS[name](device)
