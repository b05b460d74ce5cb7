"""Which files a split of a data set lies in, found out by `datasets` without fetching any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.data.shards import KINDS, Shard, reason
from fewstep.data.table import told_in_one_line
from fewstep.errors import UserError, did_you_mean

_SPLITS, _STATE = "dataset_dict.json", "state.json"
"""What `save_to_disk` leaves in a folder of splits, and in that of one set."""


@dataclass(frozen=True)
class ShardList:
    """The files of a split, in the order of their rows.

    Attributes:
        place: what messages call the set.
        kind: "parquet" or "arrow".
        files: paths of this machine, or URLs `hf://` with the commit.
    """

    place: str
    kind: str
    files: tuple[str, ...]

    @property
    def afar(self) -> bool:
        """Whether the files are on the network."""
        return any("://" in file for file in self.files)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files, none of which is opened."""
        return tuple(KINDS[self.kind](file) for file in self.files)


def kept_folder() -> Path:
    """Where what was fetched is kept: beside what `datasets` keeps."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "fewstep"


def list_shards(path: Path, config: str | None, split: str, revision: str | None) -> ShardList:
    """The files of a split.

    Args:
        path: a folder that `save_to_disk` wrote or that `load_dataset` reads, or a hub name.
        config: the set's configuration, where it has several.
        split: name of the split; parts of splits are none.
        revision: branch or commit, of a set on the hub.

    Raises:
        UserError: `datasets` is not installed or does not find the set or the split, or its files cannot be streamed.
    """
    _require_library()
    if (path / _SPLITS).is_file():
        splits = [str(name) for name in _stated(path / _SPLITS, "splits")]
        _require_split(path, split, splits)
        return _saved(path, path / split)
    if (path / _STATE).is_file():
        return _saved(path, path)
    return _found(path, config, split, revision)


def idle_options(path: Path) -> tuple[str, ...]:
    """Options that choose nothing in a folder, because `save_to_disk` wrote the one set that is there."""
    if (path / _STATE).is_file():
        return ("config", "split")
    return ("config",) if (path / _SPLITS).is_file() else ()


def _require_library() -> None:
    if find_spec("datasets") is None:
        raise UserError("data.name: huggingface needs datasets; install fewstep[data]")


def _saved(path: Path, folder: Path) -> ShardList:
    files = _stated(folder / _STATE, "_data_files")
    return ShardList(str(path), "arrow", tuple(str(folder / one["filename"]) for one in files))


def _stated(path: Path, key: str) -> Any:
    """What `save_to_disk` wrote under a key."""
    try:
        return json.loads(path.read_text())[key]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"data.path: {str(path)!r} cannot be read ({reason(error)}); save the set again") from error


def _found(path: Path, config: str | None, split: str, revision: str | None) -> ShardList:
    import datasets

    with told_in_one_line(path):
        builder = datasets.load_dataset_builder(str(path), config, revision=revision)
    files = {str(name): tuple(map(str, found)) for name, found in (builder.config.data_files or {}).items()}
    _require_split(path, split, tuple(files))
    _require_kind(path, str(builder.name), files[split])
    return ShardList(str(path), str(builder.name), files[split])


def _require_split(path: Path, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise UserError(f"data.options.split: {str(path)!r} has {', '.join(splits)}; found {split!r}"
                        f"{did_you_mean(split, splits)}")  # fmt: skip


def _require_kind(path: Path, kind: str, files: Sequence[str]) -> None:
    """What has no index of its rows would have to be fetched whole only to find out where they are."""
    afar = any("://" in file for file in files)
    if kind in KINDS and not (kind == "arrow" and afar):
        return
    mend = "leave streaming out, or save the set as parquet"
    if kind == "webdataset":
        mend = f"{'download them, and ' if afar else ''}use data.name=webdataset, which reads them as they lie"
    raise UserError(f"data.options.streaming: {str(path)!r} is made of {kind} files{' on the hub' if afar else ''}; "
                    f"{'parquet' if afar else ', '.join(KINDS)} can be streamed; {mend}")  # fmt: skip
