"""Data sets by name, as a run's config asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fewstep.data.cached import CachedLatents
from fewstep.data.caption_files import CaptionFiles
from fewstep.data.captioned import Captioned
from fewstep.data.digits import Digits
from fewstep.data.emoji import EmojiScenes, emoji32
from fewstep.data.folder import ImageFolder
from fewstep.data.options import (
    CacheOptions,
    CaptionOptions,
    Emoji32Options,
    EmojiOptions,
    FolderOptions,
    NoOptions,
    OptionsT,
    ShardOptions,
    TableOptions,
    read_options,
)
from fewstep.data.pictures import Fit
from fewstep.data.prompts import PromptList
from fewstep.data.samples import Dataset as Dataset
from fewstep.data.shard_list import idle_options, list_shards
from fewstep.data.stream import Stream
from fewstep.data.stream_order import StreamOrder
from fewstep.data.table import Table
from fewstep.data.tar_shards import TarShards
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
        name: "emoji", "emoji32", "digits", "folder", "captions", "webdataset", "huggingface", "prompts" or "cache".
        size: side of the images; None for the set's own (32, 32, 8, 64; captioned sets have none, a cache its own).
        seed: which endless stream of scenes.
        split: "train" or "held_out".
        path: the folder or file of a set that is not embedded.
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
    path = _required_path("folder", request, "the folder of the images")
    options = read_options(FolderOptions, request.options)
    return ImageFolder(path, size=request.size or 64, **options.model_dump())


def _captions(request: Request) -> Dataset:
    path = _required_path("captions", request, "the folder of the images")
    options = read_options(CaptionOptions, request.options)
    size = _required_size("captions", request)
    return Captioned(CaptionFiles(path, caption_key=options.caption_key, strict=options.strict), _fit(size, options))


def _webdataset(request: Request) -> Dataset:
    path = _required_path("webdataset", request, "a tar file, or a folder of them")
    options = _shard_options(ShardOptions, request)
    size = _required_size("webdataset", request)
    shards = TarShards(path, caption_key=options.caption_key, strict=options.strict)
    return Captioned(shards, _fit(size, options), _order(shards.sizes, options))


def _huggingface(request: Request) -> Dataset:
    path = _required_path("huggingface", request, "a folder of `datasets`, or a hub name")
    options = _shard_options(TableOptions, request)
    fit = _fit(_required_size("huggingface", request), options)
    for key in ("keep", "revision"):
        if key in request.options and path.exists():
            raise UserError(
                f"data.options.{key}: {request.options[key]} given; it does nothing without a set on the hub"
            )
    for key in idle_options(path):
        if key in request.options:
            raise UserError(f"data.options.{key}: {request.options[key]} given; it does nothing for what save_to_disk "
                            f"wrote to {str(path)!r}; leave it out")  # fmt: skip
    if options.streaming:
        return _stream(path, options, fit)
    table = Table(path, config=options.config, split=options.split, revision=options.revision,
                  image_key=options.image_key, caption_key=options.caption_key, strict=options.strict)  # fmt: skip
    return Captioned(table, fit)


def _stream(path: Path, options: TableOptions, fit: Fit) -> Dataset:
    shards = list_shards(path, options.config, options.split, options.revision)
    stream = Stream(shards, image_key=options.image_key, caption_key=options.caption_key, strict=options.strict,
                    buffer=options.buffer, keep=options.keep * 10**9)  # fmt: skip
    return Captioned(stream, fit, _order(stream.sizes, options))


def _shard_options(kind: type[OptionsT], request: Request) -> OptionsT:
    options = read_options(kind, request.options)
    for key in ("buffer", "keep"):
        if key in request.options and not request.options.get("streaming"):
            raise UserError(f"data.options.{key}: {request.options[key]} given; it does nothing without streaming")
    return options


def _order(sizes: Sequence[int], options: ShardOptions) -> StreamOrder | None:
    return StreamOrder(sizes, options.buffer, options.flip) if options.streaming else None


def _prompts(request: Request) -> Dataset:
    path = _required_path("prompts", request, "a text file with one prompt a line")
    read_options(NoOptions, request.options)
    return PromptList(path, size=_required_size("prompts", request))


def _cache(request: Request) -> Dataset:
    path = _required_path("cache", request, "the folder that `fewstep cache` made")
    cache = CachedLatents(path, check=read_options(CacheOptions, request.options).check)
    if request.size not in (None, cache.index.plan.size):
        raise UserError(f"data.size: {request.size} given, the cache in {path} is of images of "
                        f"{cache.index.plan.size}; leave it out, or make another cache")  # fmt: skip
    return cache


def _required_path(name: str, request: Request, what: str) -> Path:
    if request.path is None:
        raise UserError(f"data.path: missing; data.name={name} needs {what}")
    if request.split != "train":
        raise UserError("data.split: what data.path names is one split; give the other one as a set of its own")
    return request.path


def _required_size(name: str, request: Request) -> int:
    if request.size is None:
        raise UserError(f"data.size: missing; data.name={name} has no size of its own")
    return request.size


def _fit(size: int, options: CaptionOptions) -> Fit:
    return Fit(size, options.flip, options.allow_upscale)


def _require_size(name: str, found: int | None, only: int, hint: str = "") -> None:
    if found not in (None, only):
        raise UserError(f"data.size: found {found}, {name} comes at {only} only{hint}")


_OPENERS: dict[str, Callable[[Request], Dataset]] = {
    "emoji": _emoji,
    "emoji32": _emoji32,
    "digits": _digits,
    "folder": _folder,
    "captions": _captions,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
    "prompts": _prompts,
    "cache": _cache,
}
_WITH_PATH = ("folder", "captions", "webdataset", "huggingface", "prompts", "cache")
