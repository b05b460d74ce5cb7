r"""Make the sprite sheet of the embedded emoji data set.

The sprites are the 64 px images of Noto Emoji as packaged for npm, the names come from its sister package:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource@16.0.0
    python scripts/make_emoji_sheet.py emoji-datasource-google-16.0.0.tgz emoji-datasource-16.0.0.tgz \
        fewstep/data/assets/emoji

Each of the first two arguments may be a `.tgz` or the folder it was unpacked into. Writes `sheet.webp` (lossless RGBA
tiles of 64 px, row by row) and `index.json` (one sprite a line, in tile order). The images are Apache-2.0: keep the
`LICENSE` and `NOTICE` that lie beside the sheet. Nothing is unpacked to disk, so no archive can write outside it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

TILE = 64
COLUMNS = 32
LARGEST_MEMBER = 64 * 2**20
CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Travel & Places",
    "Activities",
    "Smileys & Emotion",
)
DROPPED_SUBCATEGORIES = ("time",)  # 24 clock faces that differ by one hand, and the watches

# Unicode names that read badly in a caption, or that name something else than what the picture shows.
RENAMED = {
    "slice of pizza": "pizza slice",
    "watermelon": "watermelon slice",
    "wrapped present": "gift box",
    "black spade suit": "spade suit",
    "black club suit": "club suit",
    "black diamond suit": "diamond suit",
    "white medium star": "yellow star",
    "black sun with rays": "sun",
    "black telephone": "red telephone",
    "black scissors": "scissors",
    "black nib": "pen nib",
    "white smiling face": "smiling face",
    "lady beetle": "ladybug",
    "automobile": "red car",
    "oncoming automobile": "oncoming red car",
    "recreational vehicle": "blue van",
    "electric light bulb": "light bulb",
    "basketball and hoop": "basketball",
    "direct hit": "dartboard",
    "billiards": "billiard ball",
    "aubergine": "eggplant",
    "ear of maize": "ear of corn",
    "ear of rice": "sheaf of rice",
    "mahjong tile red dragon": "mahjong tile",
    "playing card black joker": "joker card",
    "hocho": "kitchen knife",
    "pistol": "water pistol",
    "minidisc": "computer disk",
    "womans hat": "sun hat",
    "womans clothes": "pink blouse",
    "womans sandal": "heeled sandal",
    "womans boots": "high boot",
    "mans shoe": "brown shoe",
    "running shirt with sash": "running shirt",
    "cooking": "fried egg in a pan",
    "moon viewing ceremony": "moon viewing scene",
    "performing arts": "theatre masks",
    "statue of liberty": "liberty statue",
    "head shaking horizontally": "face shaking sideways",
    "head shaking vertically": "face nodding",
    "rolling on the floor laughing": "face rolling with laughter",
    "flag in hole": "golf hole with flag",
    "extraterrestrial alien": "alien head",
    "national park": "park landscape",
    "level slider": "slider control",
    "silhouette of japan": "map of japan",
    "police cars revolving light": "police light",
    "rescue worker's helmet": "rescue helmet",
    "closed lock with key": "lock with key",
    "electric torch": "flashlight",
    "smoking symbol": "cigarette",
    "heavy black heart": "red heart",
    "black heart suit": "heart suit",
    "hundred points symbol": "hundred points mark",
    "face with stuck-out tongue": "face with tongue out",
    "anger symbol": "anger mark",
    "collision symbol": "explosion",
    "dizzy symbol": "dizzy star",
    "splashing sweat symbol": "splash of sweat",
    "dash symbol": "puff of wind",
    "sleeping symbol": "sleeping mark",
    "link symbol": "chain link",
    "headphone": "pair of headphones",
    "foggy": "foggy bridge",
    "bowling": "bowling ball with pins",
    "camping": "campsite",
    "building construction": "building site",
    "wedding": "wedding chapel",
    "milky way": "milky way sky",
    "herb": "sprig of herb",
    "e-mail symbol": "e-mail envelope",
}


@dataclass(frozen=True)
class Sprite:
    """One tile of the sheet."""

    name: str
    category: str
    image: str


def read_package(path: Path, wanted: str) -> dict[str, bytes]:
    """The regular files below `wanted` of an npm package, by base name; no file name of an archive reaches the disk.

    Args:
        path: the package's `.tgz`, or the folder it was unpacked into.
        wanted: a folder or a file inside the package, such as `img/google/64`.
    """
    if path.is_dir():
        root = path / "package" if (path / "package").is_dir() else path
        files = [root / wanted] if (root / wanted).is_file() else sorted((root / wanted).glob("*"))
        return {file.name: file.read_bytes() for file in files if file.is_file()}
    if not path.is_file():
        sys.exit(f"{path}: no such file or folder")
    with tarfile.open(path, "r|gz") as archive:  # one pass: seeking in a compressed stream starts over each time
        return dict(member_bytes(archive, member) for member in archive if is_wanted(member, f"package/{wanted}"))


def is_wanted(member: tarfile.TarInfo, wanted: str) -> bool:
    """True for a regular file of a sensible size that is `wanted` or lies directly in it."""
    place = member.name == wanted or member.name.rpartition("/")[0] == wanted
    return place and member.isreg() and member.size <= LARGEST_MEMBER


def member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, bytes]:
    """Base name and content of a member."""
    stream = archive.extractfile(member)
    assert stream is not None
    return member.name.rpartition("/")[2], stream.read()


def clean_name(unicode_name: str) -> str:
    """The lower-cased Unicode name without `symbol` and typographic apostrophes, mended by the fix list."""
    name = unicode_name.lower().replace("\u2019", "'")
    name = RENAMED.get(name, name)
    name = re.sub(r" symbol\b", "", name)
    return RENAMED.get(name, name)


def usable(entry: dict) -> bool:
    """True for an object, not a sign, flag, clock or person."""
    kept = entry["category"] in CATEGORIES and entry["subcategory"] not in DROPPED_SUBCATEGORIES
    return kept and entry["has_img_google"]


def choose_sprites(entries: list[dict]) -> list[Sprite]:
    """The sprites of the sheet in Unicode order; skin tones never appear, they are variants inside an entry."""
    chosen = sorted(filter(usable, entries), key=lambda entry: entry["sort_order"])
    chosen.sort(key=lambda entry: CATEGORIES.index(entry["category"]))
    sprites = [Sprite(clean_name(e["name"]), e["category"], e["image"]) for e in chosen]
    names = [sprite.name for sprite in sprites]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        sys.exit(f"two sprites share a name, add to RENAMED: {', '.join(doubles)}")
    return sprites


def paste_sheet(sprites: list[Sprite], images: dict[str, bytes]) -> Image.Image:
    """All tiles row by row on one transparent sheet."""
    rows = -(-len(sprites) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for number, sprite in enumerate(sprites):
        tile = Image.open(io.BytesIO(images[sprite.image])).convert("RGBA")
        if tile.size != (TILE, TILE):
            sys.exit(f"{sprite.image}: {tile.size}, expected {TILE} x {TILE}")
        sheet.paste(tile, (number % COLUMNS * TILE, number // COLUMNS * TILE))
    return sheet


def index_text(sprites: list[Sprite]) -> str:
    """The index as JSON with one sprite a line, so that a change shows as one line."""
    rows = [
        {"name": s.name, "category": s.category, "column": n % COLUMNS, "row": n // COLUMNS}
        for n, s in enumerate(sprites)
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{"tile": {TILE}, "columns": {COLUMNS}, "sprites": [\n{lines}\n]}}\n'


def main() -> None:
    """Read the two packages and write the sheet and its index."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path, help="emoji-datasource-google: .tgz or folder")
    parser.add_argument("names", type=Path, help="emoji-datasource: .tgz or folder")
    parser.add_argument("output", type=Path, help="folder for sheet.webp and index.json")
    arguments = parser.parse_args()
    sprites = choose_sprites(json.loads(read_package(arguments.names, "emoji.json")["emoji.json"]))
    sheet = paste_sheet(sprites, read_package(arguments.images, "img/google/64"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output / "sheet.webp", lossless=True, quality=100, method=6)
    (arguments.output / "index.json").write_text(index_text(sprites), encoding="utf-8")
    size = (arguments.output / "sheet.webp").stat().st_size
    print(f"{len(sprites)} sprites, {size:,} bytes")


if __name__ == "__main__":
    main()
