"""The page: what stands on it, that nothing on it needs another file, and where its plots put a point."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.board import Board, Protocol, Row
from fewstep.evaluation.page import page
from fewstep.evaluation.plot import Level, Point, Series, chart
from fewstep.evaluation.strip import GAP, read_strip, save_strip

TEACHER = Row("teacher t", "", "teacher", 1, 1.0, 8.0, 0.02, 0.001, 0.9, 0.5, None, None, None, "T", None, "T", "t.png")
STUDENT = Row("dmd2", "<a>", "distribution", 1, 1.0, 6.0, 0.01, 0.002, 1.0, 0.1, 0, 9, 10.0, "A", "T", "s", "a.png")
BOARD = Board(
    Protocol("emoji32", "classifier", 100, 0), (TEACHER, STUDENT), {"A": {"data": {"name": "<b>"}}}
).compared()


class Tags(HTMLParser):
    """Every element of a page, and whether each that was opened is closed again."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture
def written(tmp_path):
    images = torch.randint(0, 256, (3, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_strip(tmp_path / "a.png", images)
    return images, page(BOARD, "One & two", tmp_path)


def test_the_page_is_whole_and_asks_for_nothing(written):
    _, text = written
    tags = Tags(text)
    assert tags.open == []
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe"} == set()
    assert re.findall(r"(?:https?:)?//|url\(|@import", text) == []
    assert len(tags.named("svg")) == 2
    assert len(tags.named("tr")) == 1 + 2
    assert "<h1>One &amp; two</h1>" in text
    assert "1 of 1 students&#x27; rows beat" in text or "1 of 1 students' rows beat" in text
    assert "<td>&lt;a&gt;</td>" in text
    assert "name: &lt;b&gt;" in text


def test_the_samples_are_on_the_page_pixel_for_pixel(written):
    images, text = written
    (image,) = Tags(text).named("img")
    source = image["src"] or ""
    assert source.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        pixels = np.array(picture)
    assert pixels.shape == (4, 3 * 5 + 2 * GAP, 4)
    for i, one in enumerate(images):
        left = i * (5 + GAP)
        assert np.array_equal(pixels[:, left : left + 5, :3], one.permute(1, 2, 0).numpy())
        assert (pixels[:, left : left + 5, 3] == 255).all()
        assert (pixels[:, left + 5 : left + 5 + GAP, 3] == 0).all()


def test_a_board_without_pictures_or_costs_has_a_page_without_these(tmp_path):
    rows = (TEACHER, replace(STUDENT, training_seconds=None, training_images=None))
    text = page(replace(BOARD, rows=rows).compared(), "t", tmp_path)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Quality against steps", "Settings"]


def test_a_strip_comes_back_and_another_picture_is_refused(tmp_path):
    images = torch.randint(0, 256, (3, 1, 6, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_strip(tmp_path / "a.png", images)
    assert torch.equal(read_strip(tmp_path / "a.png"), images.expand(3, 3, 6, 4))
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is no strip of samples"):
        read_strip(tmp_path / "b.png")


def circles(svg: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).iter("circle")
    return [(float(one.get("cx", "nan")), float(one.get("cy", "nan"))) for one in found]


def test_points_lie_on_logarithmic_axes():
    points = tuple(Point(x, y, "") for x, y in ((1, 1), (2, 10), (4, 100)))
    svg = chart("t", "x", "y", [Series("a", "c", points)], x_ticks=(1, 2, 4))
    (x1, y1), (x2, y2), (x3, y3) = circles(svg)
    assert x2 == pytest.approx((x1 + x3) / 2, abs=0.1)
    assert y2 == pytest.approx((y1 + y3) / 2, abs=0.1)
    assert (x1 < x3, y1 > y3) == (True, True)
    texts = {one.text: one for one in ElementTree.fromstring(svg).iter("text")}
    assert float(texts["2"].get("x", "nan")) == pytest.approx(x2, abs=0.1)
    assert float(texts["10"].get("y", "nan")) == pytest.approx(y2 + 4, abs=0.1)


def test_names_of_equal_heights_do_not_lie_on_each_other():
    series = [Series(f"n{i}", "c", (Point(1.0, 5.0, ""),)) for i in range(12)]
    svg = chart("t", "x", "y", [*series, Series("other", "c", (Point(2.0, 7.0, ""),))], [Level("l", "c", 5.0)])
    names = [one for one in ElementTree.fromstring(svg).iter("text") if one.get("class") == "name"]
    heights = sorted(float(one.get("y", "nan")) for one in names)
    assert len(heights) == 14
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12.9
    assert heights[0] > 30
    assert heights[-1] < 330


@pytest.mark.parametrize(("low", "high"), [(250.0, 320.0), (1.0, 1.001), (0.2, 40.0), (3.0, 3.0), (1e-3, 1e6)])
def test_an_axis_has_at_least_three_labels_whatever_its_range(low, high):
    svg = chart("t", "x", "y", [Series("a", "c", (Point(low, 1.0, ""), Point(high, 2.0, "")))])
    ticks = [one for one in ElementTree.fromstring(svg).iter("text") if one.get("text-anchor") == "middle"]
    labels = [one.text for one in ticks if one.get("class") == "tick"]
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)
