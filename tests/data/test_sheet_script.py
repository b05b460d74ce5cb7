"""The script that made the sprite sheet: what it reads from an archive, and how it names and picks."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_emoji_sheet.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_emoji_sheet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "make_emoji_sheet", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def entry(name: str, category: str, order: int, **more: object) -> dict:
    return {"name": name, "category": category, "subcategory": "any", "sort_order": order, "has_img_google": True,
            "image": f"{order}.png", **more}  # fmt: skip


ENTRIES = [
    entry("PIZZA SLICE OF", "Food & Drink", 2),
    entry("HEAVY BLACK HEART", "Smileys & Emotion", 1),
    entry("RAT", "Animals & Nature", 9),
    entry("CLOCK FACE ONE OCLOCK", "Travel & Places", 3, subcategory="time"),
    entry("Egypt Flag", "Flags", 4),
    entry("COW", "Animals & Nature", 5, has_img_google=False),
    entry("HIGH VOLTAGE SIGN", "Travel & Places", 6),
    entry("NEW MOON SYMBOL", "Travel & Places", 7),
]


def test_objects_are_kept_in_order_with_readable_names(script):
    names = [sprite.name for sprite in script.choose_sprites(ENTRIES)]
    assert names == ["rat", "pizza slice of", "high voltage sign", "new moon", "red heart"]


def test_two_sprites_of_one_name_are_refused(script):
    with pytest.raises(SystemExit, match="two sprites share a name, add to RENAMED: rat"):
        script.choose_sprites([*ENTRIES, entry("RAT", "Objects", 8)])


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/img/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    return path


def test_an_archive_gives_only_regular_files_of_the_wanted_folder(script, tmp_path):
    files = {
        "package/img/a.png": b"a",
        "package/img/../../b.png": b"b",
        "/package/img/c.png": b"c",
        "package/d.png": b"d",
    }
    made = archive(tmp_path / "x.tgz", files)
    assert script.read_package(made, "img") == {"a.png": b"a"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tgz"]


def test_a_folder_reads_like_its_archive(script, tmp_path):
    (tmp_path / "package" / "img").mkdir(parents=True)
    (tmp_path / "package" / "img" / "a.png").write_bytes(b"a")
    assert script.read_package(tmp_path, "img") == {"a.png": b"a"}
    assert script.read_package(tmp_path, "img/a.png") == {"a.png": b"a"}
    with pytest.raises(SystemExit, match="no such file or folder"):
        script.read_package(tmp_path / "none", "img")


def test_tiles_lie_where_the_index_says(script):
    sprites = [script.Sprite(str(n), "Objects", f"{n}.png") for n in range(34)]
    images = {}
    for n in range(34):
        stream = io.BytesIO()
        Image.new("RGBA", (64, 64), (n, 2 * n, 3 * n, 255)).save(stream, "PNG")
        images[f"{n}.png"] = stream.getvalue()
    sheet, index = script.paste_sheet(sprites, images), json.loads(script.index_text(sprites))
    assert sheet.size == (32 * 64, 2 * 64)
    for n, row in enumerate(index["sprites"]):
        assert row["name"] == str(n)
        assert sheet.getpixel((row["column"] * 64 + 5, row["row"] * 64 + 60)) == (n, 2 * n, 3 * n, 255)
