"""Data sets by name."""

from __future__ import annotations

import pytest
from PIL import Image

from fewstep.data.emoji import EmojiScenes
from fewstep.data.sources import open_dataset
from fewstep.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red").mkdir()
    Image.new("RGB", (80, 80), "red").save(tmp_path / "red" / "a.png")
    return tmp_path


def test_each_name_opens_its_set(folder):
    opened = {
        "emoji": open_dataset("emoji", size=64, options={"classes": ["banana", "rocket"], "scale": [0.5, 0.6]}),
        "emoji32": open_dataset("emoji32", seed=4),
        "digits": open_dataset("digits", size=8, split="held_out"),
        "folder": open_dataset("folder", path=folder, options={"flip": True}),
    }
    assert {name: (data.shape, len(data.classes), data.length) for name, data in opened.items()} == {
        "emoji": ((3, 64, 64), 2, None),
        "emoji32": ((3, 32, 32), 24, None),
        "digits": ((1, 8, 8), 10, 179),
        "folder": ((3, 64, 64), 1, 2),
    }
    for data in opened.values():
        assert data.batch([0, 1]).images.shape == (2, *data.shape)


def test_seed_split_and_options_reach_the_scenes():
    data = open_dataset("emoji", seed=9, split="held_out", options={"objects": [1, 2], "hold_out": 0.3, "length": 5})
    assert isinstance(data, EmojiScenes)
    assert (data.seed, data.split, data.objects, data.hold_out, data.length) == (9, "held_out", (1, 2), 0.3, 5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"name": "emojis"}, r"data\.name: no data set 'emojis', allowed are emoji, .*; did you mean 'emoji"),
        ({"name": "emoji", "path": "x"}, r"data\.path: emoji is embedded and takes no path"),
        ({"name": "emoji32", "size": 64}, r"data\.size: found 64, emoji32 comes at 32 only; data\.name=emoji takes"),
        ({"name": "emoji32", "split": "held_out"}, r"data\.split: emoji32 holds nothing out"),
        ({"name": "emoji32", "options": {"classes": 3}}, r"data\.options\.classes: unknown key, allowed are length"),
        ({"name": "digits", "size": 16}, r"data\.size: found 16, digits comes at 8 only"),
        ({"name": "digits", "options": {"a": 1}}, r"data\.options\.a: unknown key, allowed are none"),
        ({"name": "folder"}, r"data\.path: missing"),
        ({"name": "folder", "path": "/no/such"}, r"data\.path: no folder '/no/such'"),
        ({"name": "folder", "path": ".", "split": "held_out"}, r"data\.split: what data\.path names is one split"),
        ({"name": "emoji", "options": {"jiter": 1}}, r"data\.options\.jiter: unknown key.*did you mean 'jitter'"),
        ({"name": "emoji", "options": {"jitter": "far"}}, r"data\.options\.jitter: .*valid number.*; found 'far'"),
        ({"name": "emoji", "options": {"scale": [0.1]}}, r"data\.options\.scale: .*; found \[0\.1\]"),
        ({"name": "emoji", "options": {"classes": [1, 2]}}, r"data\.options\.classes: .*; found \[1, 2\]"),
        ({"name": "emoji", "options": {"classes": ["bananna"]}}, r"named 'bananna'; did you mean 'banana'"),
        ({"name": "emoji", "split": "test"}, r"emoji split: found 'test'"),
    ],
)
def test_a_wrong_request_gets_one_clear_line(arguments, line):
    with pytest.raises(UserError, match=line) as caught:
        open_dataset(**arguments)
    assert "\n" not in str(caught.value)
