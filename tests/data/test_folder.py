"""Image folders: labels, captions, the square cut, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.folder import ImageFolder
from fewstep.errors import UserError


def save(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(path)


def captions(folder: Path, rows: list[object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    save(tmp_path / "set" / "dog" / "one.png", (255, 0, 0))
    save(tmp_path / "set" / "cat" / "two.png", (0, 255, 0))
    save(tmp_path / "set" / "cat" / "deep" / "three.jpg", (255, 255, 255))
    save(tmp_path / "set" / ".cache" / "hidden.png")
    return tmp_path / "set"


def test_labels_follow_the_sorted_sub_folders(classes):
    data = ImageFolder(classes, size=8)
    assert data.classes == ("cat", "dog")
    assert (len(data), data.shape) == (3, (3, 8, 8))
    batch = data.batch([0, 1, 2])
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 1]
    assert batch.labels.dtype == torch.int64
    assert batch.images[2, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert batch.images[1, :, 0, 0].tolist() == [-1.0, 1.0, -1.0]
    assert batch.captions is None


def test_captions_of_a_metadata_file(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "sub" / "b.png", (0, 0, 255))
    captions(
        tmp_path, [{"file_name": "sub/b.png", "text": "a blue square"}, {"file_name": "a.png", "text": "a red one"}]
    )
    data = ImageFolder(tmp_path, size=8)
    batch = data.batch([0, 1])
    assert batch.captions == ("a blue square", "a red one")
    assert batch.labels is None
    assert data.classes == ()
    assert batch.images[0, :, 4, 4].tolist() == [-1.0, -1.0, 1.0]


def test_the_shorter_side_is_fitted_and_the_middle_cut_out(tmp_path):
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 255
    (tmp_path / "x").mkdir()
    Image.fromarray(stripes).save(tmp_path / "x" / "wide.png")
    assert torch.equal(ImageFolder(tmp_path, size=8).batch([0]).images, torch.ones(1, 3, 8, 8))
    small = ImageFolder(tmp_path, size=4).batch([0]).images[0, 0]
    assert small[:, 1:3].min() > 0.98  # away from the stripe's edges


def test_shrinking_is_antialiased_bicubic(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "x").mkdir()
    Image.fromarray(noise).save(tmp_path / "x" / "noise.png")
    image = ImageFolder(tmp_path, size=16).batch([0]).images
    smooth = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(smooth, size=(16, 16), mode="bicubic", antialias=True)
    assert ((image + 1) * 127.5 - expected.clamp(0, 255)).abs().max() < 1.01  # Pillow rounds after each axis


def test_transparency_is_laid_over_white(tmp_path):
    save(tmp_path / "x" / "glass.png", (255, 0, 0, 128))
    assert ImageFolder(tmp_path, size=8).batch([0]).images[0, :, 0, 0].add(1).mul(127.5).round().tolist() == [
        255,
        127,
        127,
    ]


def test_a_camera_note_turns_the_picture_upright(tmp_path):
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4] = 255
    note = Image.Exif()
    note[0x0112] = 3  # upside down
    (tmp_path / "x").mkdir()
    Image.fromarray(halves).save(tmp_path / "x" / "turned.png", exif=note)
    image = ImageFolder(tmp_path, size=8).batch([0]).images[0]
    assert (image[:, :4].max(), image[:, 4:].min()) == (-1.0, 1.0)


def test_flip_adds_the_mirror_images(tmp_path):
    (tmp_path / "x").mkdir()
    ramp = np.repeat(np.arange(8, dtype=np.uint8)[None, :, None] * 30, 8, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "x" / "ramp.png")
    data = ImageFolder(tmp_path, size=8, flip=True)
    plain, mirrored = data.batch([0, 1]).images
    assert len(data) == 2
    assert torch.equal(mirrored, plain.flip(2))
    assert not torch.equal(mirrored, plain)


def test_small_images_are_enlarged_only_on_demand(classes):
    with pytest.raises(UserError, match=r"is 10 x 8, smaller than size 16; set allow_upscale"):
        ImageFolder(classes, size=16).batch([0])
    assert ImageFolder(classes, size=16, allow_upscale=True).batch([0]).images.shape == (1, 3, 16, 16)


def test_the_number_of_classes_can_be_demanded(classes):
    assert len(ImageFolder(classes, size=8, expected_classes=2).classes) == 2
    with pytest.raises(UserError, match="has 2 class sub-folders, 3 are expected"):
        ImageFolder(classes, size=8, expected_classes=3)


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_outside_is_refused(classes, index):
    with pytest.raises(IndexError, match="outside 0 to 2"):
        ImageFolder(classes, size=8).batch([index])


def no_folder(root: Path) -> Path:
    save(root / "photos" / "x" / "a.png")
    return root / "photo"


def a_file(root: Path) -> Path:
    save(root / "a.png")
    return root / "a.png"


def empty(root: Path) -> Path:
    (root / "notes.txt").write_text("nothing")
    return root


def neither(root: Path) -> Path:
    save(root / "a.png")
    save(root / "b.png")
    return root


def empty_class(root: Path) -> Path:
    save(root / "cat" / "a.png")
    (root / "dog").mkdir()
    return root


def uncaptioned(root: Path) -> Path:
    save(root / "a.png")
    save(root / "b.png")
    captions(root, [{"file_name": "a.png", "text": "an a"}])
    return root


def metadata(*rows: object):
    def build(root: Path) -> Path:
        save(root / "a.png")
        captions(root, list(rows))
        return root

    return build


def broken_json(root: Path) -> Path:
    captions(root, [{"file_name": "a.png", "text": "x"}])
    save(root / "a.png")
    with (root / "metadata.jsonl").open("a") as stream:
        stream.write("{oops\n")
    return root


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (no_folder, r"data\.path: no folder '.*photo'; did you mean 'photos'\?"),
        (a_file, r"'.*a\.png' is a file, a folder is needed"),
        (empty, r"holds no image; \.png, "),
        (neither, r"has neither metadata\.jsonl nor every image in a class sub-folder \(2 .* such as 'a\.png'"),
        (empty_class, r"class sub-folder '.*dog' holds no image"),
        (uncaptioned, r"metadata\.jsonl' has no caption for 1 of 2 images, such as 'b\.png'"),
        (metadata(), r"metadata\.jsonl' is empty"),
        (metadata({"file_name": "a.png"}), r"line 1: needs 'text', a string"),
        (metadata({"text": "x"}), r"line 1: needs 'file_name', a string"),
        (metadata({"file_name": "a.png", "text": 3}), r"line 1: needs 'text', a string"),
        (metadata([]), r"line 1: needs 'file_name', a string"),
        (metadata({"file_name": "c.png", "text": "x"}), r"line 1: no file 'c\.png'"),
        (metadata({"file_name": "../a.png", "text": "x"}), r"line 1: '\.\./a\.png' leads out of the folder"),
        (broken_json, r"line 2: no JSON"),
    ],
)
def test_a_wrong_folder_gets_one_clear_line(tmp_path, build, line):
    path = build(tmp_path)
    with pytest.raises(UserError, match=line) as caught:
        ImageFolder(path, size=8)
    assert "\n" not in str(caught.value)


def truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp"])
@pytest.mark.parametrize("damage", [truncated, lambda path: path.write_bytes(b"no image"), lambda path: path.touch()])
def test_an_unreadable_image_is_named(tmp_path, name, damage):
    (tmp_path / "x").mkdir()
    damage(tmp_path / "x" / name)
    with pytest.raises(UserError, match=rf"'.*{name}' cannot be read as an image \(.+\)$") as caught:
        ImageFolder(tmp_path, size=8).batch([0])
    assert "\n" not in str(caught.value)


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    (tmp_path / "x").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "x" / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png' has more than 8 bits a channel"):
        ImageFolder(tmp_path, size=8).batch([0])
