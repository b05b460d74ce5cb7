"""Captioned pictures in folders, tar files and tables, and lists of prompts."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.faults import DataFault
from fewstep.data.folder import ImageFolder
from fewstep.data.samples import Dataset
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError

CAPTIONS = ("a red fish", "two blue birds", "a green frog on a stone")


def picture(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """Noise, each number another."""
    noise = np.random.default_rng(number).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, format="PNG")
    return stream.getvalue()


def in_folder(root: Path, captions: tuple[str, ...] = CAPTIONS) -> Path:
    """The first caption in `metadata.jsonl`, the others beside their pictures."""
    root.mkdir(parents=True)
    for i, caption in enumerate(captions):
        picture(i).save(root / f"{i}.png")
        if i:
            (root / f"{i}.txt").write_text(f"  {caption}\n")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": captions[0]}) + "\n")
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def in_tars(root: Path, captions: tuple[str, ...] = CAPTIONS) -> Path:
    """Two samples a shard; captions as text and as JSON by turns."""
    root.mkdir(parents=True)
    for first in range(0, len(captions), 2):
        with tarfile.open(root / f"set-{first // 2:03d}.tar", "w") as archive:
            for i in range(first, min(first + 2, len(captions))):
                add(archive, f"dir/{i:05d}.png", encoded(i))
                as_json = json.dumps({"text": captions[i], "width": 12}).encode()
                suffix, content = ("json", as_json) if i % 2 else ("txt", captions[i].encode())
                add(archive, f"dir/{i:05d}.{suffix}", content)
    return root


def in_table(root: Path, captions: tuple[str | None, ...] = CAPTIONS) -> Path:
    datasets = pytest.importorskip("datasets")
    root.mkdir(parents=True)
    for i in range(len(captions)):
        picture(i).save(root / f"{i}.png")
    columns = {"image": [str(root / f"{i}.png") for i in range(len(captions))], "text": list(captions)}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(root / "saved")
    return root / "saved"


KINDS: dict[str, Callable[..., Path]] = {"captions": in_folder, "webdataset": in_tars, "huggingface": in_table}
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(multiprocess|dill|datasets).*")


def opened(kind: str, path: Path, **options: object) -> Dataset:
    return open_dataset(kind, path=path, size=8, options=options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_samples_as_an_image_folder(tmp_path, kind):
    plain = in_folder(tmp_path / "plain")
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (plain / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = ImageFolder(plain, size=8, flip=True).batch(range(6))
    data = opened(kind, KINDS[kind](tmp_path / "set"), flip=True)
    assert (data.shape, data.length, data.classes) == ((3, 8, 8), 6, ())
    batch = data.batch(range(6))
    assert torch.equal(batch.images, expected.images)
    assert batch.captions == expected.captions == CAPTIONS * 2
    assert torch.equal(data.batch([4, 1]).images, expected.images[[4, 1]])


@pytest.mark.parametrize("kind", ["captions", "webdataset"])
def test_a_set_travels_to_another_process(tmp_path, kind):
    data = opened(kind, KINDS[kind](tmp_path / "set"))
    assert torch.equal(pickle.loads(pickle.dumps(data)).batch([2]).images, data.batch([2]).images)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_without_captions_are_counted_once(tmp_path, kind, caplog):
    with caplog.at_level(logging.WARNING, "fewstep.data"):
        data = opened(kind, KINDS[kind](tmp_path / "set", ("one", " ", "three", "")))
    assert data.batch([0, 1]).captions == ("one", "three")
    assert data.length == 2
    (told,) = caplog.messages
    assert told.startswith("warning: data.path: ")
    assert "has no caption for 2 of 4 pictures, such as '" in told
    assert told.endswith("they are left out")
    assert torch.equal(data.batch([1]).images, opened("captions", in_folder(tmp_path / "all")).batch([2]).images)


@pytest.mark.parametrize(("kind", "first"), [("captions", "1.png"), ("webdataset", "00001.png"), ("huggingface", "1")])
def test_strict_refuses_them_and_names_the_first(tmp_path, kind, first):
    path = KINDS[kind](tmp_path / "set", ("one", " ", "three", ""))
    with pytest.raises(UserError, match=rf"no caption for 2 of 4 pictures, such as '[^']*{first}'; write them"):
        opened(kind, path, strict=True)


def test_captions_by_another_key_and_in_sub_folders(tmp_path):
    root = tmp_path / "set"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        picture(0).save(root / name / "x.png")
        (root / name / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "prompt": f"of {name}"}))
    assert opened("captions", root, caption_key="prompt").batch([0, 1]).captions == ("of a", "of b")


def test_huggingface_reads_a_folder_by_its_convention(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = in_folder(tmp_path / "set", ("one",))
    data = opened("huggingface", root)
    assert data.batch([0]).captions == ("one",)
    assert torch.equal(data.batch([0]).images, opened("captions", root).batch([0]).images)


def test_prompts_have_a_shape_and_no_pixels(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two   dogs \n", encoding="utf-8")
    data = open_dataset("prompts", path=tmp_path / "prompts.txt", size=16)
    batch = data.batch([1, 0])
    assert (data.length, batch.captions) == (2, ("two dogs", "a cat"))
    assert batch.images.shape == (2, 3, 16, 16)
    assert bool(batch.images.isnan().all())


def hostile(name: str, **facts: object) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        root.mkdir()
        with tarfile.open(root / "a.tar", "w") as archive:
            add(archive, "0.png", encoded(0))
            member = tarfile.TarInfo(name)
            for key, value in facts.items():
                setattr(member, key, value)
            archive.addfile(member)
        return root

    return build


def cut(at: int) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        path = in_tars(root) / "set-000.tar"
        path.write_bytes(path.read_bytes()[:at])
        return root

    return build


def twice(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        add(archive, "0.png", encoded(0))
        add(archive, "0.jpg", encoded(0))
    return root


def texts(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        root.mkdir()
        picture(0).save(root / "0.png")
        (root / name).write_bytes(content)
        return root

    return build


def member(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        root.mkdir()
        with tarfile.open(root / "a.tar", "w") as archive:
            add(archive, "0.png", encoded(0))
            add(archive, name, content)
        return root

    return build


def compressed(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "a.tar.gz", "w:gz") as archive:
        add(archive, "0.png", encoded(0))
    return root


def nothing(root: Path) -> Path:
    root.mkdir()
    return root


@pytest.mark.parametrize(
    ("kind", "build", "line"),
    [
        ("webdataset", hostile("../0.txt"), r"a\.tar' has a member '\.\./0\.txt', which leads out of the archive"),
        ("webdataset", hostile("/etc/0.txt"), r"member '/etc/0\.txt', which leads out of the archive"),
        ("webdataset", hostile("x/../../0.txt"), r"member 'x/\.\./\.\./0\.txt', which leads out"),
        ("webdataset", hostile("..\\0.txt"), r"which leads out of the archive"),
        ("webdataset", hostile("C:/0.txt"), r"which leads out of the archive"),
        ("webdataset", hostile("0.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), r"'0\.txt', which is a link"),
        ("webdataset", hostile("0.txt", type=tarfile.LNKTYPE, linkname="0.png"), r"'0\.txt', which is a link"),
        ("webdataset", cut(700), r"set-000\.tar' cannot be read as a tar file \("),
        ("webdataset", cut(1024), r"set-000\.tar' cannot be read as a tar file \("),
        ("webdataset", cut(0), r"set-000\.tar' cannot be read as a tar file \("),
        ("webdataset", twice, r"several pictures of one key '0': '0\.png' and '0\.jpg'"),
        ("webdataset", compressed, r"a\.tar\.gz' is compressed or no tar file"),
        ("webdataset", nothing, r"holds no \.tar file"),
        ("webdataset", member("0.json", b"{oops"), r"member '0\.json' is no JSON"),
        ("webdataset", member("0.txt", b"\xff"), r"member '0\.txt' is no text in UTF-8 \(byte 0\)"),
        ("webdataset", member("1.txt", b"x"), r"no caption for any of its 1 pictures; data\.options\.caption_key"),
        ("webdataset", lambda root: root, r"data\.path: no file or folder '.*set'"),
        ("captions", nothing, r"holds no picture"),
        ("captions", texts("0.txt", b"\xff"), r"0\.txt' is no text in UTF-8"),
        ("captions", texts("metadata.jsonl", b"\xff"), r"metadata\.jsonl' is no text in UTF-8"),
        ("captions", texts("metadata.jsonl", b'{"text": "x"}'), r"line 1: needs 'file_name', a string"),
        ("captions", texts("metadata.jsonl", b'{"file_name": "9.png", "text": "x"}'), r"line 1: no file '9\.png'"),
        ("captions", texts("metadata.jsonl", b'{"file_name": "metadata.jsonl", "text": "x"}'), r"none of \.png"),
        ("captions", lambda root: root, r"data\.path: no folder '.*set'"),
        ("huggingface", nothing, r"data\.path: datasets cannot open '.*set' \("),
        ("prompts", lambda root: root, r"data\.path: '.*set' cannot be read \(No such file"),
        ("prompts", nothing, r"data\.path: '.*set' cannot be read \(Is a directory\)"),
    ],
)
def test_what_cannot_be_used_gets_one_clear_line(tmp_path, kind, build, line):
    path = build(tmp_path / "set")
    with pytest.raises(UserError, match=line) as caught:
        open_dataset(kind, path=path, size=8)
    assert "\n" not in str(caught.value)


def test_a_shard_cut_between_two_members_is_seen(tmp_path):
    path = in_tars(tmp_path / "set") / "set-000.tar"
    with tarfile.open(path) as archive:
        second = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:second])
    with pytest.raises(UserError, match=r"it has no end; was it cut short\?"):
        opened("webdataset", path)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"name": "captions"}, r"data\.path: missing; data\.name=captions needs the folder of the images"),
        ({"name": "webdataset", "path": "."}, r"data\.size: missing; data\.name=webdataset has no size of its own"),
        ({"name": "prompts", "path": ".", "options": {"flip": True}}, r"data\.options\.flip: unknown key"),
        ({"name": "huggingface", "path": ".", "options": {"streaming": True}}, r"data\.size: missing"),
        ({"name": "cache", "path": "."}, r"data\.path: \. holds no cache"),
        ({"name": "caption", "path": "."}, r"no data set 'caption'.*did you mean 'captions'"),
        ({"name": "captions", "path": ".", "split": "held_out"}, r"data\.split: what data\.path names is one split"),
    ],
)
def test_a_wrong_request_gets_one_clear_line(arguments, line):
    with pytest.raises(UserError, match=line):
        open_dataset(**arguments)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"split": "test"}, r"data\.options\.split: '.*' has train; found 'test'"),
        ({"image_key": "imag"}, r"data\.options\.image_key: no column 'imag'; did you mean 'image'\?; there are"),
        ({"caption_key": "caption"}, r"data\.options\.caption_key: no column 'caption'; there are image, text"),
        ({"image_key": "text"}, r"data\.options\.image_key: column 'text' is a Value, one of pictures is needed"),
    ],
)
def test_a_table_without_what_is_asked_for(tmp_path, options, line):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_from_disk(in_table(tmp_path / "set"))
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match=line):
        opened("huggingface", tmp_path / "dict", **options)


@pytest.mark.parametrize(
    ("kind", "build"), [("captions", in_folder), ("webdataset", in_tars), ("huggingface", in_folder)]
)
def test_a_file_that_vanishes_while_reading_is_a_fault_of_the_run(tmp_path, monkeypatch, kind, build):
    if kind == "huggingface":
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = build(tmp_path / "set", ("one",))
    data = opened(kind, path)
    data.batch([0])
    for file in [*path.glob("*.png"), *path.glob("*.tar")]:
        file.unlink()
    with pytest.raises(DataFault, match=r"cannot be read any more \(No such file or directory\); put it back"):
        data.batch([0])


def test_a_shard_that_is_cut_while_reading_is_a_fault_of_the_run(tmp_path):
    path = in_tars(tmp_path / "set")
    data = opened("webdataset", path)
    (path / "set-000.tar").write_bytes(b"")
    with pytest.raises(DataFault, match=r"set-000\.tar' is shorter than when the run began"):
        data.batch([0])


def test_a_damaged_member_is_named(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        add(archive, "0.png", b"no picture")
        add(archive, "0.txt", b"a caption")
    with pytest.raises(UserError, match=r"a\.tar/0\.png' cannot be read as an image"):
        opened("webdataset", root).batch([0])
