"""Tar files of pictures and captions as the webdataset library writes them, read in any order.

The library reads shards from front to back, shuffles what it holds in memory, and leaves what it has read to each
process: where a run stood cannot be told by one number. So the members are listed once, when the set is opened, and
read by their place in the file. Nothing is ever unpacked.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from fewstep.data.captioned import one_line, settle_missing
from fewstep.data.faults import DataFault, vanished
from fewstep.data.listing import SUFFIXES
from fewstep.data.pictures import read_image
from fewstep.errors import UserError, did_you_mean

_BLOCK = 512  # bytes; a tar file is a sequence of such blocks, and ends with two of zeros


@dataclass(frozen=True)
class _Picture:
    """Where the bytes of a picture are."""

    shard: Path
    member: str
    start: int
    size: int


@dataclass
class _Sample:
    """What a shard holds under one key."""

    pictures: list[_Picture] = field(default_factory=list)
    caption: str = ""


class TarShards:
    """The captioned pictures of tar files.

    The members `KEY.jpg` and `KEY.txt`, or `KEY.json` with the caption under `caption_key`, are one sample; a key ends
    at the first dot of a file's name. Other members are passed over. Blank captions count as missing.

    Args:
        path: a tar file, or a folder with some.
        caption_key: the caption's key in the `.json` members.
        strict: refuse pictures without a caption, in place of leaving them out.

    Raises:
        UserError: nothing there, a damaged or compressed tar file, a member whose name leads out of the archive, or
            no captioned picture.
    """

    def __init__(self, path: Path, *, caption_key: str = "text", strict: bool = False) -> None:
        pictures: list[_Picture] = []
        captions: list[str] = []
        for shard in shard_files(path):
            for key, sample in _samples(shard, caption_key).items():
                if len(sample.pictures) > 1:
                    names = " and ".join(repr(one.member) for one in sample.pictures[:2])
                    raise UserError(f"data.path: {str(shard)!r} has several pictures of one key {key!r}: {names}")
                pictures += sample.pictures
                captions += [sample.caption] * len(sample.pictures)
        missing = [_named(picture) for picture, text in zip(pictures, captions, strict=True) if not text]
        settle_missing(str(path), missing, len(pictures), strict)
        self._pictures = tuple(picture for picture, text in zip(pictures, captions, strict=True) if text)
        self.captions = tuple(text for text in captions if text)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Captioned pictures of each tar file that has some, in their order."""
        return tuple(Counter(picture.shard for picture in self._pictures).values())

    def name(self, number: int) -> str:
        """The shard's path and the member's name."""
        return _named(self._pictures[number])

    def picture(self, number: int) -> Image.Image:
        """The member's picture."""
        picture = self._pictures[number]
        try:
            with picture.shard.open("rb") as stream:
                stream.seek(picture.start)
                content = stream.read(picture.size)
        except OSError as error:
            raise vanished(picture.shard, error) from error
        if len(content) < picture.size:
            raise DataFault(f"data.path: {str(picture.shard)!r} is shorter than when the run began; put it back")
        return read_image(io.BytesIO(content), self.name(number))


def shard_files(path: Path) -> tuple[Path, ...]:
    """The tar files of a folder, by name, or the one that is named.

    Raises:
        UserError: there is none, or one is compressed, so that its members have no place in the file.
    """
    if path.is_file():
        shards = [path]
    elif path.is_dir():
        shards = sorted(p for p in path.iterdir() if ".tar" in p.suffixes and not p.name.startswith("."))
    else:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"data.path: no file or folder {str(path)!r}{near}")
    if not shards:
        raise UserError(f"data.path: {str(path)!r} holds no .tar file")
    for shard in shards:
        if shard.suffix != ".tar":
            raise UserError(f"data.path: {str(shard)!r} is compressed or no tar file; plain .tar files are read")
    return tuple(shards)


def _samples(shard: Path, caption_key: str) -> Mapping[str, _Sample]:
    """The samples of one shard by key, in the order of their first members."""
    found: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in _members(shard, archive):
                key, suffix = _split(member.name)
                sample = found.setdefault(key, _Sample())
                if f".{suffix}" in SUFFIXES:
                    sample.pictures.append(_Picture(shard, member.name, member.offset_data, member.size))
                elif suffix == "txt":
                    sample.caption = one_line(_text(shard, archive, member))
                elif suffix == "json":
                    sample.caption = sample.caption or _from_json(shard, archive, member, caption_key)
            _refuse_torn(shard, archive)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"data.path: {str(shard)!r} cannot be read as a tar file ({error})") from error
    except OSError as error:
        raise UserError(f"data.path: {str(shard)!r} cannot be read ({error.strerror or error})") from error
    return found


def _members(shard: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive.

    Nothing is unpacked, so that a name could do no harm here; but an archive with names that lead elsewhere was made
    to do harm, and nobody should train on it unawares.
    """
    for member in archive:
        parts = PurePosixPath(member.name.replace("\\", "/")).parts
        if member.name.startswith(("/", "\\")) or ".." in parts or ":" in (parts or ("",))[0]:
            raise UserError(f"data.path: {str(shard)!r} has a member {member.name!r}, which leads out of the archive")
        if member.issym() or member.islnk():
            raise UserError(f"data.path: {str(shard)!r} has a member {member.name!r}, which is a link; give files only")
        if member.isfile():
            yield member


def _split(name: str) -> tuple[str, str]:
    """Key and suffix, the latter without its dot and in small letters; the key ends at the first dot of the name."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _text(shard: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream = archive.extractfile(member)
    assert stream is not None
    try:
        return stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: {str(shard)!r} member {member.name!r} is no text in UTF-8 (byte {error.start})"
        ) from error


def _from_json(shard: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> str:
    try:
        values = json.loads(_text(shard, archive, member))
    except json.JSONDecodeError as error:
        raise UserError(f"data.path: {str(shard)!r} member {member.name!r} is no JSON ({error})") from error
    return one_line(values.get(key)) if isinstance(values, dict) else ""


def _refuse_torn(shard: Path, archive: tarfile.TarFile) -> None:
    """A file that was cut between two members reads without an error; what it lacks is its end."""
    if archive.offset + _BLOCK > shard.stat().st_size:
        raise UserError(f"data.path: {str(shard)!r} cannot be read as a tar file (it has no end; was it cut short?)")


def _named(picture: _Picture) -> str:
    return f"{picture.shard}/{picture.member}"
