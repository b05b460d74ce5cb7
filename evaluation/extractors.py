"""Feature networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.errors import UserError, did_you_mean

from .classifier import ClassifierFeatures, shipped_classifier
from .clip import ClipFeatures
from .dinov2 import DEFAULT, DinoFeatures
from .efficientnet import Lite0Features
from .features import Extractor
from .inception import InceptionFeatures, find_weights
from .lpips import LpipsFeatures, find_trunk
from .user_module import ModuleFeatures

Device = torch.device | str


@dataclass(frozen=True)
class _Kind:
    """A feature network that can be asked for.

    Attributes:
        form: how its name is written.
        make: from what stands behind the colon, empty where nothing does.
        argument: whether something may, or must, stand there.
    """

    form: str
    make: Callable[[str, Device], Extractor]
    argument: str = "none"


def _classifier(path: str, device: Device) -> Extractor:
    return ClassifierFeatures(Path(path), device) if path else shipped_classifier(device)


_KINDS = {
    "classifier": _Kind("classifier[:FOLDER]", _classifier, "may"),
    "efficientnet-lite0": _Kind("efficientnet-lite0", lambda _, device: Lite0Features(device)),
    "inception": _Kind(
        "inception[:PATH]",
        lambda path, device: InceptionFeatures(Path(path) if path else find_weights(), device),
        "may",
    ),
    "clip": _Kind("clip:ARCH:TAG_OR_PATH", ClipFeatures, "must"),
    "dinov2": _Kind("dinov2[:FOLDER_OR_NAME]", lambda place, device: DinoFeatures(place or DEFAULT, device), "may"),
    "lpips": _Kind(
        "lpips[:PATH]", lambda path, device: LpipsFeatures(Path(path) if path else find_trunk(), device), "may"
    ),
    "module": _Kind("module:PACKAGE.ATTR", ModuleFeatures, "must"),
}


def extractor_names() -> tuple[str, ...]:
    """How every name that `extractor` takes is written."""
    return tuple(kind.form for kind in _KINDS.values())


def extractor(name: str, device: Device = "cpu") -> Extractor:
    """The feature network called `name`, on `device`.

    Raises:
        UserError: no such name, or its weights are not installed.
    """
    word, _, argument = name.partition(":")
    kind = _KINDS.get(word)
    if kind is None:
        raise UserError(f"features: none is named {word!r}, allowed are {', '.join(extractor_names())}"
                        f"{did_you_mean(word, _KINDS)}")  # fmt: skip
    if (kind.argument == "none" and argument) or (kind.argument == "must" and not argument):
        raise UserError(f"features: found {name!r}, the form is {kind.form}")
    return kind.make(argument, device)
