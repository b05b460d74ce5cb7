"""Grids of samples: every pixel where it belongs, and never half a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.grid import save_grid

WHITE, FRAME = (255, 255, 255), (222, 226, 230)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_grid_without_titles_holds_every_pixel_three_times(tmp_path):
    rows = [torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8) for _ in range(2)]
    save_grid(tmp_path / "grid.png", rows, ["", ""])
    picture = pixels(tmp_path / "grid.png")
    assert picture.shape == (14 + 2 * 24 + 5 + 14, 14 + 4 * 24 + 3 * 5 + 14, 3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            y, x = 14 + r * 29, 14 + c * 29
            assert np.array_equal(picture[y : y + 24 : 3, x : x + 24 : 3], image.permute(1, 2, 0).numpy())
            assert np.array_equal(picture[y + 2 : y + 24 : 3, x + 2 : x + 24 : 3], image.permute(1, 2, 0).numpy())
            assert tuple(picture[y - 1, x]) == tuple(picture[y, x + 24]) == FRAME
            assert tuple(picture[y + 12, x + 26]) == WHITE


def test_titles_stand_left_of_and_above_the_images(tmp_path):
    rows = [torch.zeros(2, 3, 32, 32)] * 2
    save_grid(tmp_path / "grid.png", rows, ["teacher\n4 steps", ""], ["cat", ""], scale=3)
    dark = np.asarray((pixels(tmp_path / "grid.png") < 120).all(axis=2))
    height, width = len(dark), len(dark[0])
    left, top = width - 14 - 2 * 96 - 5, height - 14 - 2 * 96 - 5
    title = dark[top : top + 96, :left]
    assert title.any()
    assert not title[:, left - 14 :].any()
    assert np.flatnonzero(title.any(axis=1)).mean() == pytest.approx(48, abs=4)  # beside the middle of its row
    assert not dark[top + 96 :, :left].any()
    column = dark[:top, left : left + 96]
    assert np.flatnonzero(column.any(axis=0)).mean() == pytest.approx(48, abs=3)
    assert not dark[:top, left + 101 :].any()


def test_floats_are_shown_as_they_are_scored(tmp_path):
    save_grid(
        tmp_path / "grid.png", [torch.full((1, 1, 4, 4), 1.02), torch.full((1, 1, 4, 4), -1.5)], ["", ""], scale=1
    )
    picture = pixels(tmp_path / "grid.png")
    assert picture[14, 14].tolist() == [255, 255, 255]
    assert picture[14 + 9, 14].tolist() == [0, 0, 0]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_grid(path, [torch.zeros(1, 3, 4, 4)], ["a"])
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": Path("grid.jpg")}, "found the ending '.jpg', allowed is '.png'"),
        ({"row_titles": []}, "found 0 row titles for 2 rows"),
        ({"column_titles": ["a"]}, "found 1 column titles for 3 columns"),
        ({"rows": [torch.zeros(3, 3, 4, 4), torch.zeros(2, 3, 4, 4)]}, "rows of [2, 3] images"),
        ({"rows": [torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 8, 4)]}, "of sizes [(4, 4), (8, 4)]"),
        ({"scale": 0}, "grid scale: found 0"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, change, said):
    rows = [torch.zeros(3, 3, 4, 4)] * 2
    fitting = {"path": tmp_path / "grid.png", "rows": rows, "row_titles": ["a", "b"], "column_titles": (), "scale": 1}
    with pytest.raises(UserError) as caught:
        save_grid(**{**fitting, **change})
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())
