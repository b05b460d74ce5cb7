"""Data sets by name, as a run's config asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewstep.data.digits import Digits
from fewstep.data.emoji import EmojiScenes, emoji32
from fewstep.data.folder import ImageFolder
from fewstep.data.options import Emoji32Options, EmojiOptions, FolderOptions, NoOptions, read_options
from fewstep.data.samples import Dataset as Dataset
from fewstep.errors import UserError, did_you_mean

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Request:
    """What a config says about its data; `size` and `path` are None where it says nothing."""

    size: int | None
    seed: int
    split: str
    path: Path | None
    options: Mapping[str, Any]


def open_dataset(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    split: str = "train",
    path: str | Path | None = None,
    options: Mapping[str, Any] = _NONE,
) -> Dataset:
    """The data set of that name.

    Args:
        name: "emoji", "emoji32", "digits" or "folder".
        size: side of the images; None for the set's own (32, 32, 8, 64).
        seed: which endless stream of scenes.
        split: "train" or "held_out".
        path: the folder of "folder".
        options: further arguments of the set.

    Raises:
        UserError: an unknown name or option, or a value that the set does not allow.
    """
    if name == "mixture":
        raise UserError(f"data.name: mixture is the set of `fewstep verify`, a run takes {', '.join(_OPENERS)}")
    if name not in _OPENERS:
        raise UserError(f"data.name: no data set {name!r}, allowed are {', '.join(_OPENERS)}"
                        f"{did_you_mean(name, _OPENERS)}")  # fmt: skip
    if path is not None and name not in _WITH_PATH:
        raise UserError(f"data.path: {name} is embedded and takes no path; did you mean data.name=folder?")
    return _OPENERS[name](Request(size, seed, split, Path(path) if path is not None else None, options))


def _emoji(request: Request) -> Dataset:
    options = read_options(EmojiOptions, request.options)
    return EmojiScenes(size=request.size or 32, seed=request.seed, split=request.split, **options.model_dump())


def _emoji32(request: Request) -> Dataset:
    _require_size("emoji32", request.size, 32, "; data.name=emoji takes other sizes")
    if request.split != "train":
        raise UserError("data.split: emoji32 holds nothing out; measure against the same set with another seed")
    return emoji32(seed=request.seed, length=read_options(Emoji32Options, request.options).length)


def _digits(request: Request) -> Dataset:
    _require_size("digits", request.size, 8)
    read_options(NoOptions, request.options)
    return Digits(request.split)


def _folder(request: Request) -> Dataset:
    if request.path is None:
        raise UserError("data.path: missing; data.name=folder needs the folder of the images")
    if request.split != "train":
        raise UserError("data.split: a folder is one split; give the other one as a folder of its own")
    options = read_options(FolderOptions, request.options)
    return ImageFolder(request.path, size=request.size or 64, **options.model_dump())


def _require_size(name: str, found: int | None, only: int, hint: str = "") -> None:
    if found not in (None, only):
        raise UserError(f"data.size: found {found}, {name} comes at {only} only{hint}")


_OPENERS: dict[str, Callable[[Request], Dataset]] = {
    "emoji": _emoji,
    "emoji32": _emoji32,
    "digits": _digits,
    "folder": _folder,
}
_WITH_PATH = ("folder",)
