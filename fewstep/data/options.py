"""What `data.options` may say for each data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewstep.errors import UserError, did_you_mean


class Options(BaseModel):
    """Closed and strict: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NoOptions(Options):
    """For sets that have nothing to choose."""


class EmojiOptions(Options):
    """Arguments of `EmojiScenes`."""

    classes: int | tuple[str, ...] | None = None
    """Sprite names, or the first N of the curated order; None: all 995."""
    objects: int | tuple[int, ...] = 1
    """Objects in a scene: 1, 2, or [1, 2]."""
    backgrounds: int | tuple[str, ...] = 10
    """Background names, or the first N."""
    scale: tuple[float, float] = (0.6, 0.95)
    """Least and greatest width of a sprite, as a share of the canvas."""
    jitter: float = 0.15
    """How far a sprite may lie off its place, as a share of the canvas."""
    flip: bool = True
    """Whether half of the sprites are mirrored."""
    hold_out: float = 0.1
    """Share of the caption combinations kept out of training."""
    length: int | None = None
    """Number of samples; None: endless."""


class Emoji32Options(Options):
    """What may differ in the main job's set."""

    length: int | None = None
    """Number of samples; None: endless."""


class FolderOptions(Options):
    """Arguments of `ImageFolder`."""

    flip: bool = False
    """Adds every image a second time, mirrored."""
    allow_upscale: bool = False
    """Accepts images smaller than the size."""
    expected_classes: int | None = None
    """How many class sub-folders there must be."""


class CaptionOptions(Options):
    """What all sets of captioned pictures have in common."""

    flip: bool = False
    """Adds every picture a second time, mirrored."""
    allow_upscale: bool = False
    """Accepts pictures smaller than the size."""
    caption_key: str = "text"
    """The caption's key in `metadata.jsonl` and in `.json` members, or its column."""
    strict: bool = False
    """Refuses pictures without a caption, in place of leaving them out with a warning."""


class ShardOptions(CaptionOptions):
    """Arguments of `TarShards`, and in which order they are read."""

    streaming: bool = False
    """Reads the shards as they lie, in an order that keeps to them; makes no copy of a table."""
    buffer: int = Field(default=1000, ge=1)
    """Of a stream: how many pictures are mixed with each other; 1 mixes what is read at once alone."""


class TableOptions(ShardOptions):
    """Arguments of `Table` and of `Stream`."""

    keep: int = Field(default=10, ge=0)
    """Of a stream from the hub: gigabytes of it that stay on the disk, for the other processes of this machine."""

    config: str | None = None
    """The set's configuration, where it has several."""
    split: str = "train"
    """The split, as `datasets.load_dataset` takes it; a stream takes whole splits."""
    revision: str | None = None
    """Branch or commit of a set on the hub; None: what is there when the run starts, or goes on."""
    image_key: str = "image"
    """The column of pictures."""


class CacheOptions(Options):
    """Arguments of `CachedLatents`."""

    check: bool = True
    """Compares the checksum of every file when the cache is opened; their sizes are always compared."""


OptionsT = TypeVar("OptionsT", bound=Options)


def read_options(kind: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Checked options.

    Raises:
        UserError: an unknown key, or a value of the wrong type; one line, with the place.
    """
    for key in values:
        if key not in kind.model_fields:
            allowed = ", ".join(kind.model_fields) or "none"
            raise UserError(
                f"data.options.{key}: unknown key, allowed are {allowed}{did_you_mean(key, kind.model_fields)}"
            )
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"][0] if first["loc"] else ""
        raise UserError(f"data.options.{place}: {first['msg'].lower()}; found {values.get(str(place))!r}") from error
