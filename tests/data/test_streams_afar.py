"""Streams of files on the network: what is asked for, what is kept, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fewstep.data.faults import DataFault
from fewstep.data.shard_list import ShardList, list_shards
from fewstep.data.stream import Stream
from fewstep.errors import UserError
from tests.data.hub_lab import COMMIT, hub_with
from tests.data.stream_lab import (
    CACHE,
    CAPTIONS,
    FILES,
    Afar,
    in_parquet,
    opened,
    table,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(multiprocess|dill|datasets).*")


def from_afar(scheme: str, root: Path, files: dict[str, bytes]) -> ShardList:
    names = tuple(f"{scheme}://{root.name}/{name}" for name in FILES)
    files |= {f"{root.name}/{name}": (root / "data" / name).read_bytes() for name in FILES}
    return ShardList(root.name, "parquet", names)


def test_files_afar_are_the_same_stream_and_only_what_is_needed_is_asked_for(tmp_path, monkeypatch):
    root = in_parquet(tmp_path / "set", group=2)
    big = table(range(16), CAPTIONS[:16], side=250)
    pq.write_table(big, root / "data" / FILES[0], row_group_size=2)
    monkeypatch.setattr(Afar, "files", {})
    monkeypatch.setattr(Afar, "asked", [])
    monkeypatch.setattr(CACHE, tmp_path / "kept")
    stream = Stream(from_afar("afar", root, Afar.files), buffer=4)
    size = sum(map(len, Afar.files.values()))
    assert sum(Afar.asked) < size / 10  # the last 64 kB of each file, for the footer, and the captions
    Afar.asked.clear()
    local = opened(root).gallery
    assert isinstance(local, Stream)
    assert stream.picture(5).tobytes() == local.picture(5).tobytes()
    assert stream.captions[5] == local.captions[5]
    assert sum(Afar.asked) < size / 5  # one row group of the eight large ones, and footers
    assert stream.name(5) == f"afar://set/{FILES[0]} row 5"
    assert stream.digest == local.digest
    Afar.asked.clear()
    again = Stream(from_afar("afar", root, {}), buffer=4)
    assert (Afar.asked, again.sizes, again.digest) == ([], stream.sizes, stream.digest)  # the first start has kept it
    (kept,) = (tmp_path / "kept" / "fewstep").glob("*.json")
    kept.write_text(kept.read_text()[:50])
    assert Stream(from_afar("afar", root, {}), buffer=4).sizes == stream.sizes
    assert len(Afar.asked) > 3
    del Afar.files[f"set/{FILES[2]}"]
    with pytest.raises(DataFault, match=rf"'afar://set/{FILES[2]} row 10' cannot be read any more \(No such file"):
        stream.picture(len(stream) - 1)


def full_disk(number: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_block_from_afar_is_fetched_once_for_all_processes(tmp_path, monkeypatch):
    root = in_parquet(tmp_path / "set")
    monkeypatch.setattr(Afar, "files", {})
    monkeypatch.setattr(Afar, "asked", [])
    monkeypatch.setattr(CACHE, tmp_path / "kept")
    shards, local = from_afar("afar", root, Afar.files), opened(root).gallery
    one, other = (Stream(shards, keep=10**6) for _ in range(2))
    first = [(one.captions[i], one.picture(i).tobytes()) for i in range(23)]
    assert first == [(local.captions[i], local.picture(i).tobytes()) for i in range(23)]
    Afar.asked.clear()
    assert [(other.captions[i], other.picture(i).tobytes()) for i in range(23)] == first
    assert Afar.asked == []
    kept = sorted((tmp_path / "kept" / "fewstep" / "blocks").glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    assert len(kept) == len(one.sizes)
    sizes = [path.stat().st_size for path in kept]
    kept[3].write_bytes(kept[3].read_bytes()[:50])
    kept[-1].unlink()
    tight = Stream(shards, keep=sum(sizes[-3:]))
    assert [(tight.captions[i], tight.picture(i).tobytes()) for i in range(23)] == first
    left = list((tmp_path / "kept" / "fewstep" / "blocks").iterdir())
    assert sum(path.stat().st_size for path in left) <= sum(sizes[-3:])
    assert {path.suffix for path in left} == {".arrow", ""}  # no half-written files; locks
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.shard_keep.os.fsync", full_disk)
        other = Stream(shards, keep=1)
        assert [(other.captions[i], other.picture(i).tobytes()) for i in range(23)] == first


def test_what_a_killed_process_was_writing_does_not_pile_up(tmp_path, monkeypatch):
    """Loader workers are killed at the end of every run, in whatever they do."""
    root = in_parquet(tmp_path / "set")
    monkeypatch.setattr(Afar, "files", {})
    monkeypatch.setattr(CACHE, tmp_path / "kept")
    stream = Stream(from_afar("afar", root, Afar.files), keep=10**6)
    blocks = tmp_path / "kept" / "fewstep" / "blocks"
    for pid in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("fewstep.data.shard_keep.os.fsync", full_disk)
            patch.setattr(Path, "unlink", lambda *args, **words: None)
            patch.setattr(os, "getpid", lambda pid=pid: pid)
            stream._held.clear()
            stream.picture(0)
    assert len(list(blocks.glob("*.partial"))) == 1
    stream._held.clear()
    stream.picture(0)
    assert len(list(blocks.glob("*.arrow"))) == 1
    assert not list(blocks.glob("*.partial"))


def test_files_in_the_memory_of_fsspec_are_the_same_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(CACHE, tmp_path / "kept")
    root = in_parquet(tmp_path / "set", [*CAPTIONS[:4], None, " ", *CAPTIONS[6:]])
    files: dict[str, bytes] = {}
    shards = from_afar("memory", root, files)
    for name, content in files.items():
        MemoryFileSystem().pipe_file(f"/{name}", content)
    for stream in (Stream(shards), Stream(shards)):  # the second knows what the first has kept
        assert [stream.captions[i] for i in range(21)] == [*CAPTIONS[:4], *CAPTIONS[6:]]
        assert stream.picture(20).tobytes() == opened(root).gallery.picture(20).tobytes()
        assert stream.name(4) == f"memory://set/{FILES[1]} row 1"
    (tmp_path / "file").touch()
    monkeypatch.setattr(CACHE, tmp_path / "file")
    with pytest.raises(UserError, match=r"file/fewstep' cannot be written \(.*\); give another folder in the environ"):
        Stream(shards)


def hub(monkeypatch: pytest.MonkeyPatch, kind: str, *files: str) -> None:
    """A set on the hub of which `datasets` has found the files."""
    found = SimpleNamespace(name=kind, config=SimpleNamespace(data_files={"train": [*files]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **facts: found)


def test_a_set_on_the_hub_is_read_where_it_is(monkeypatch):
    hub(monkeypatch, "parquet", "hf://datasets/me/set@abc/data/a.parquet")
    shards = list_shards(Path("me/set"), None, "train", None)
    assert shards == ShardList("me/set", "parquet", ("hf://datasets/me/set@abc/data/a.parquet",))


FROM_THE_HUB = """
import sys
import torch
from fewstep.data.loader import Loader
from fewstep.data.sources import open_dataset

options = {"streaming": True, "buffer": 6}
ours, its = (open_dataset("huggingface", path=path, size=8, options=options) for path in ("me/set", sys.argv[1]))
for workers in (0, 2):
    for _, one, other in zip(range(6), Loader(ours, 4, seed=1, workers=workers), Loader(its, 4, seed=1)):
        assert torch.equal(one.x, other.x)
print(ours.length, ours.gallery.name(3))
"""


@pytest.mark.slow
def test_a_set_on_a_hub_is_the_stream_that_its_files_are(tmp_path):
    """By the libraries' own requests, answered by a stand-in on this machine."""
    root = in_parquet(tmp_path / "set", [*CAPTIONS[:3], None, *CAPTIONS[4:]], side=200)
    with hub_with(root) as server:
        facts = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        words = [sys.executable, "-c", FROM_THE_HUB, str(root)]
        done = [subprocess.run(words, env={**os.environ, **facts}, capture_output=True, text=True) for _ in range(2)]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].stdout == done[0].stdout == f"22 hf://datasets/me/set@{COMMIT}/data/{FILES[0]} row 4\n"
    assert "no caption for 1 of 23 pictures" in done[0].stderr
    size = sum(path.stat().st_size for path in (root / "data").iterdir())
    assert size < server.bytes_sent < 2 * size  # each row group once for all processes and both runs, and footers


@pytest.mark.parametrize(
    ("kind", "file", "line"),
    [
        ("webdataset", "hf://datasets/me/set@abc/a.tar", r"made of webdataset files on the hub; parquet can be "
         r"streamed; download them, and use data\.name=webdataset, which reads them as they lie"),
        ("arrow", "hf://datasets/me/set@abc/a.arrow", r"made of arrow files on the hub; parquet can be streamed; lea"),
        ("webdataset", "/set/a.tar", r"made of webdataset files; parquet, arrow can be streamed; use data\.name=webda"),
        ("imagefolder", "/set/a.png", r"made of imagefolder files; .*; leave streaming out, or save the set as parque"),
    ],
)  # fmt: skip
def test_files_without_an_index_are_refused(monkeypatch, kind, file, line):
    hub(monkeypatch, kind, file)
    with pytest.raises(UserError, match=rf"data\.options\.streaming: 'me/set' is {line}"):
        list_shards(Path("me/set"), None, "train", None)
