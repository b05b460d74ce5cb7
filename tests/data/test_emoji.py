"""Emoji scenes: what they show is what they say, whatever the batch, the process and the split."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fewstep.data.backgrounds import BACKGROUNDS
from fewstep.data.emoji import EMOJI32_BACKGROUNDS, EmojiScenes, emoji32
from fewstep.data.scenes import Meaning, with_article
from fewstep.data.sprites import EMOJI32_CLASSES, FOLDER, all_sprites, mirrorable, tile
from fewstep.errors import UserError

EIGHT = ("red apple", "banana", "cat face", "dog face", "rocket", "balloon", "tulip", "octopus")
EMOJI32_FIRST_64 = "b4641d12318d7c1738200a8114be9f95513c18653c0b7c125a6a53dce38d74dd"

BOTH = EmojiScenes(size=64, objects=(1, 2))


def levels(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(levels(images).numpy().tobytes()).hexdigest()


def test_the_sheet_holds_995_named_sprites():
    assert len(all_sprites()) == 995
    assert (FOLDER / "sheet.webp").stat().st_size <= 3 * 10**6
    assert {(s.row, s.column) for s in all_sprites().values()} == {divmod(n, 32) for n in range(995)}
    assert all(int(tile(sprite)[3].max()) > 150 for sprite in all_sprites().values())
    assert {(FOLDER / name).exists() for name in ("LICENSE", "NOTICE")} == {True}


def test_the_main_jobs_set_is_the_one_the_teacher_was_trained_on():
    batch = emoji32().batch(range(64))
    assert digest(batch.images) == EMOJI32_FIRST_64
    assert emoji32().classes == EMOJI32_CLASSES
    assert len(set(EMOJI32_CLASSES)) == 24
    assert emoji32().shape == (3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64


def test_images_fill_the_range_and_hold_256_levels():
    images = emoji32().batch(range(256)).images
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert torch.equal(images, levels(images).float().div(127.5).sub(1.0))


@pytest.mark.parametrize("data", [emoji32(), BOTH], ids=["emoji32", "both"])
def test_a_scene_does_not_depend_on_its_batch(data):
    whole = data.batch(range(300))
    for part in ([0], [299, 7], list(range(100, 170))):
        batch = data.batch(part)
        assert torch.equal(batch.images, whole.images[part])
        assert batch.captions == tuple(whole.captions[index] for index in part)


def test_a_scene_does_not_depend_on_threads_or_precision():
    expected, threads = BOTH.batch(range(100, 140)).images, torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(BOTH.batch(range(100, 140)).images, expected)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


def test_another_seed_is_another_set():
    first, second = (EmojiScenes(seed=seed).batch(range(64)) for seed in (0, 1))
    assert len(set(first.captions) & set(second.captions)) < 8
    assert not torch.equal(first.images[0], second.images[0])


def test_an_opaque_middle_shows_the_sheets_colour():
    data = EmojiScenes(size=64, classes=("red apple",), scale=(1, 1), flip=False, backgrounds=("white",), hold_out=0)
    sprite, drawn = tile(all_sprites()["red apple"]), levels(data.batch([0]).images)[0]
    opaque = sprite[3] == 255
    assert int(opaque.sum()) > 1000
    assert torch.equal(drawn[:, opaque], sprite[:3, opaque])
    assert (drawn[:, sprite[3] == 0] == 255).all()


def test_the_corner_shows_the_named_background():
    batch = BOTH.batch(range(200))
    for image, scene in zip(levels(batch.images), batch.scenes, strict=True):
        free = [left > 1 and top > 1 for left, top, _ in scene.boxes]
        if all(free):
            assert tuple(image[:, 0, 0].tolist()) == BACKGROUNDS[scene.background].top


def test_sprites_lie_in_their_boxes_and_nowhere_else():
    data = EmojiScenes(size=32, objects=(1, 2), backgrounds=("white",), classes=EIGHT)
    batch = data.batch(range(100))
    for image, scene in zip(levels(batch.images), batch.scenes, strict=True):
        outside = torch.ones(32, 32, dtype=torch.bool)
        for left, top, width in scene.boxes:
            assert min(left, top) >= -1e-4
            assert max(left, top) + width <= 32 + 1e-4
            box = (slice(int(np.floor(low)), int(np.ceil(low + width))) for low in (top, left))
            rows, columns = box
            outside[rows, columns] = False
            assert int(image[:, rows, columns].min()) < 200
        assert (image[:, outside] == 255).all()


def test_relations_hold_for_the_boxes():
    scenes = EmojiScenes(size=64, objects=2).batch(range(400)).scenes
    for scene in scenes:
        (left_a, top_a, width_a), (left_b, top_b, _) = scene.boxes
        assert scene.objects[0] != scene.objects[1]
        gap = left_b - left_a - width_a if scene.relation == "left of" else top_b - top_a - width_a
        assert gap > -1e-4
    share = sum(scene.relation == "above" for scene in scenes) / len(scenes)
    assert share == pytest.approx(0.5, abs=0.1)


def test_captions_tell_the_facts():
    batch = BOTH.batch(range(300))
    assert {len(scene.objects) for scene in batch.scenes} == {1, 2}
    for caption, scene in zip(batch.captions, batch.scenes, strict=True):
        words = [with_article(name) for name in scene.objects]
        joined = {None: "", "left of": " to the left of ", "above": " above "}[scene.relation].join(words)
        assert caption == f"{joined} on {with_article(scene.background)} background"


def test_a_caption_word_for_word():
    data = EmojiScenes(objects=2, classes=("red apple", "cat face"), backgrounds=("blue",), hold_out=0)
    assert set(data.batch(range(64)).captions) == {
        f"{first} {relation} {second} on a blue background"
        for first, second in [("a red apple", "a cat face"), ("a cat face", "a red apple")]
        for relation in ("to the left of", "above")
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("octopus", "an octopus"),
        ("unicorn face", "a unicorn face"),
        ("european castle", "a european castle"),
        ("x-ray", "an x-ray"),
        ("cherries", "cherries"),
        ("umbrella", "an umbrella"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("oncoming taxi", "an oncoming taxi"),
    ],
)
def test_articles(name, said):
    assert name in all_sprites()
    assert with_article(name) == said


def test_labels_agree_with_the_facts_and_are_balanced():
    batch = emoji32().batch(range(4800))
    assert batch.labels is not None
    assert [EMOJI32_CLASSES[int(label)] for label in batch.labels[:500]] == [s.objects[0] for s in batch.scenes[:500]]
    counts = torch.bincount(batch.labels, minlength=24).double()
    assert (counts - 200).square().sum() / 200 < 60  # chi-square, 23 degrees of freedom
    assert {scene.background for scene in batch.scenes[:500]} == set(EMOJI32_BACKGROUNDS)


def test_two_object_scenes_have_no_label():
    assert BOTH.classes == ()
    assert BOTH.batch([0]).labels is None


def test_sizes_and_places_stay_in_their_ranges():
    data = EmojiScenes(size=32, scale=(0.75, 0.95), jitter=2 / 32)
    left, top, width = np.array([scene.boxes[0] for scene in data.batch(range(2000)).scenes]).T
    assert 24 <= width.min() < 24.1
    assert 30.3 < width.max() <= 30.4 + 1e-4
    shifts = np.stack([left + width / 2 - 16, top + width / 2 - 16])
    assert 1.9 < np.abs(shifts).max() <= 2.0
    assert min(left.min(), top.min()) >= 0


def test_names_that_tell_left_from_right_are_never_mirrored():
    assert [n for n in ("left speech bubble", "first quarter moon", "red apple") if not mirrorable(n)] == [
        "left speech bubble",
        "first quarter moon",
    ]
    one_way, free = (EmojiScenes(classes=(name,), hold_out=0) for name in ("left speech bubble", "red apple"))
    assert not one_way.batch(range(50)).layout.flip.any()
    assert free.batch(range(50)).layout.flip.any()


def combinations(meaning: Meaning) -> set[tuple[int, ...]]:
    columns = np.column_stack([meaning.objects, meaning.relation, meaning.background])
    return {tuple(row) for row in columns.tolist()}


@pytest.mark.parametrize(("objects", "count"), [(1, 80), (2, 1120)])
def test_training_shows_every_combination_but_the_held_out_ones(objects, count):
    chosen = {"classes": EIGHT, "objects": objects, "size": 8}
    indices = range(20 * count)
    trained, held = (combinations(EmojiScenes(split=s, **chosen).meaning(indices)) for s in ("train", "held_out"))
    assert len(held) > 3
    assert not trained & held
    assert len(trained | held) == count


def test_no_held_out_combination_is_ever_trained_on_in_the_full_set():
    data = EmojiScenes(size=8, objects=(1, 2))
    assert not data.vocabulary.held_out(data.meaning(range(200_000)), 0.1).any()
    other = EmojiScenes(size=8, objects=(1, 2), split="held_out", seed=5)
    assert other.vocabulary.held_out(other.meaning(range(20_000)), 0.1).all()


def test_what_is_drawn_is_what_is_meant():
    assert combinations(BOTH.batch(range(50)).meaning) == combinations(BOTH.meaning(range(50)))


def held_out_pairs(data: EmojiScenes) -> set[tuple[str, str]]:
    """Names of the held-out combinations of one object and a background."""
    words, every = data.vocabulary, data.vocabulary.every_single()
    held = every.rows(words.held_out(every, 0.1))
    numbers = zip(held.objects[:, 0], held.background, strict=True)
    return {(words.sprites[sprite], words.backgrounds[background]) for sprite, background in numbers}


def test_a_tenth_of_the_combinations_is_held_out_by_name_alone():
    held = held_out_pairs(EmojiScenes(size=8))
    assert len(held) / 9950 == pytest.approx(0.1, abs=0.012)  # 4 standard deviations
    few = held_out_pairs(
        EmojiScenes(size=8, classes=tuple(reversed(EMOJI32_CLASSES)), backgrounds=("sky", "navy"), seed=3)
    )
    assert len(few) > 0
    assert few == {(s, b) for s, b in held if s in EMOJI32_CLASSES and b in ("sky", "navy")}


def test_a_share_held_out_of_more_holds_out_the_same_and_more():
    vocabulary = EmojiScenes(size=8, classes=EIGHT).vocabulary
    every = vocabulary.every_pair()
    small, large = vocabulary.held_out(every, 0.1), vocabulary.held_out(every, 0.3)
    assert not (small & ~large).any()
    assert large.mean() == pytest.approx(0.3, abs=0.06)


def test_a_finite_set_ends():
    data = EmojiScenes(length=10)
    assert data.batch([9]).images.shape == (1, 3, 32, 32)
    for index in (10, -1):
        with pytest.raises(IndexError, match="outside 0 to 10"):
            data.batch([index])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"size": 30}, "emoji size: found 30, allowed are multiples of 8"),
        ({"classes": ("red aple",)}, "no sprite is named 'red aple'; did you mean 'red apple'"),
        ({"classes": ()}, "emoji classes: found 0 names"),
        ({"classes": ("banana", "banana")}, "emoji classes: found 2 names, each must be given once"),
        ({"classes": 996}, "emoji classes: found 996, allowed are 1 to 995"),
        ({"classes": ("banana",), "objects": 2}, "scenes of two objects need at least two"),
        ({"objects": 3}, r"emoji objects: found \(3,\), allowed are 1, 2 and \(1, 2\)"),
        ({"backgrounds": ("navi",)}, "none is named 'navi'; did you mean 'navy'"),
        ({"backgrounds": 11}, "emoji backgrounds: found 11, allowed are 1 to 10"),
        ({"backgrounds": ()}, "emoji backgrounds: found 0 names"),
        ({"scale": (0.9, 0.5)}, "emoji scale: found"),
        ({"scale": (0.5, 1.5)}, "emoji scale: found"),
        ({"jitter": -0.1}, "emoji jitter: found -0.1"),
        ({"hold_out": 1.0}, "emoji hold_out: found 1.0"),
        ({"split": "heldout"}, "emoji split: found 'heldout'.*did you mean 'held_out'"),
        ({"split": "held_out", "hold_out": 0}, "holds none of the 9950 combinations"),
        ({"length": 0}, "emoji length: found 0"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(arguments, line):
    with pytest.raises(UserError, match=line) as caught:
        EmojiScenes(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_a_thousand_images_a_second_on_one_core(size):
    import time

    data, threads = EmojiScenes(size=size, objects=(1, 2)), torch.get_num_threads()
    data.batch(range(64))
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        for first in range(0, 2048, 64):
            data.batch(range(first, first + 64))
        rate = 2048 / (time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    print(f"{rate:.0f} images/s at {size} px")
    assert rate > 1000
