"""Emoji scenes: one or two Noto emoji on a coloured background, composed when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.backgrounds import background_rows, chosen_backgrounds
from fewstep.data.compose import draw, over
from fewstep.data.counter import Words, uniforms
from fewstep.data.scenes import RELATIONS, Meaning, Scene, Vocabulary, signed_uniforms, two_objects
from fewstep.data.sprites import EMOJI32_CLASSES, chosen_names, mirrorable, premultiplied
from fewstep.errors import UserError, did_you_mean

SPLITS = ("train", "held_out")
EMOJI32_BACKGROUNDS = ("white", "navy", "turquoise", "lilac")
_AT_ONCE = 256  # scenes composed together: more of them fall out of the processor's cache
_ENUMERABLE = 64  # with more sprites than this, some pair is always on either side


@dataclass(frozen=True)
class Layout:
    """Where the objects of N scenes lie; column 1 is meaningless where a scene has one object.

    Attributes:
        x: `(N, 2)` middle from the left edge, in pixels.
        y: `(N, 2)` middle from the upper edge, in pixels.
        width: `(N, 2)` width and height of the drawn sprite, in pixels.
        flip: `(N, 2)` true where the sprite is mirrored.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    width: NDArray[np.float32]
    flip: NDArray[np.bool_]

    def rows(self, index: slice) -> Layout:
        """The scenes at `index`."""
        return Layout(self.x[index], self.y[index], self.width[index], self.flip[index])


@dataclass(frozen=True)
class EmojiBatch:
    """Composed scenes with all that is known about them.

    Attributes:
        images: `(B, 3, S, S)` float32 in [-1, 1], one of 256 levels each.
        labels: `(B,)` int64, number of the sprite; None for sets with two-object scenes.
        meaning: what the scenes show, as numbers.
        layout: where the objects lie.
        vocabulary: names of the numbers.
        condition: none that is ready made.
    """

    images: Tensor
    labels: Tensor | None
    meaning: Meaning
    layout: Layout
    vocabulary: Vocabulary
    condition: None = None

    @cached_property
    def scenes(self) -> tuple[Scene, ...]:
        """The facts of every scene, by name."""
        return tuple(self._scene(row) for row in range(len(self.images)))

    @property
    def captions(self) -> tuple[str, ...]:
        """One sentence a scene."""
        return tuple(scene.caption for scene in self.scenes)

    def _scene(self, row: int) -> Scene:
        shown = [int(number) for number in self.meaning.objects[row] if number >= 0]
        relation = int(self.meaning.relation[row])
        return Scene(
            objects=tuple(self.vocabulary.sprites[number] for number in shown),
            boxes=tuple(self._box(row, slot) for slot in range(len(shown))),
            relation=RELATIONS[relation] if relation >= 0 else None,
            background=self.vocabulary.backgrounds[int(self.meaning.background[row])],
        )

    def _box(self, row: int, slot: int) -> tuple[float, float, float]:
        x, y, width = (float(a[row, slot]) for a in (self.layout.x, self.layout.y, self.layout.width))
        return x - width / 2, y - width / 2, width


class EmojiScenes:
    """A data set of composed scenes; sample i is a pure function of the arguments and of i.

    Args:
        size: height and width in pixels, a multiple of 8.
        classes: sprite names, or the first N of the curated order, or None for all 995.
        objects: how many objects a scene has: 1, 2, or (1, 2) for either.
        backgrounds: background names, or the first N of the ten.
        scale: least and greatest width of a sprite, as a share of the canvas (of its half, with two objects).
        jitter: how far a sprite may lie off its place, as a share of the canvas. Sprites are never cut by the edge.
        flip: whether half of the sprites are mirrored; never those whose name tells left from right.
        hold_out: share of the combinations (object, object, relation, background) kept out of "train".
        split: "train", or "held_out" for nothing but the combinations kept out.
        seed: another seed is another set, with the same combinations held out.
        length: number of samples; None for an endless set.

    Raises:
        UserError: an argument outside its range, or a split without any combination.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        classes: Sequence[str] | int | None = None,
        objects: tuple[int, ...] | int = 1,
        backgrounds: Sequence[str] | int = 10,
        scale: tuple[float, float] = (0.6, 0.95),
        jitter: float = 0.15,
        flip: bool = True,
        hold_out: float = 0.1,
        split: str = "train",
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        self.size, self.seed, self.length = size, seed, length
        self.objects = (objects,) if isinstance(objects, int) else tuple(objects)
        self.scale, self.jitter = (float(scale[0]), float(scale[1])), float(jitter)
        self.hold_out, self.split = float(hold_out), split
        self.vocabulary = Vocabulary(chosen_names(classes), chosen_backgrounds(backgrounds))
        self._check_arguments()
        self._check_combinations()
        self._sprites = premultiplied(self.vocabulary.sprites)
        self._mirrorable = np.array([flip and mirrorable(name) for name in self.vocabulary.sprites])
        self._rows = background_rows(self.vocabulary.backgrounds, size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.size, self.size)

    @property
    def classes(self) -> tuple[str, ...]:
        """Sprite names by label; empty where scenes may have two objects, which no single label can name."""
        return self.vocabulary.sprites if self.objects == (1,) else ()

    def batch(self, indices: Sequence[int]) -> EmojiBatch:
        """The scenes at `indices`.

        Raises:
            IndexError: an index below 0, or past the length.
        """
        index = self._checked(indices)
        meaning = self._meaning(index)
        layout = self._layout(index, meaning)
        labels = torch.from_numpy(meaning.objects[:, 0].copy()) if self.classes else None
        parts = [slice(first, first + _AT_ONCE) for first in range(0, max(len(index), 1), _AT_ONCE)]
        images = torch.cat([self._compose(meaning.rows(part), layout.rows(part)) for part in parts])
        return EmojiBatch(images, labels, meaning, layout, self.vocabulary)

    def meaning(self, indices: Sequence[int]) -> Meaning:
        """What the scenes at `indices` show, without drawing them.

        Raises:
            IndexError: an index below 0, or past the length.
        """
        return self._meaning(self._checked(indices))

    def _checked(self, indices: Sequence[int]) -> Words:
        index = np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or (self.length is not None and index.max() >= self.length)):
            raise IndexError(f"emoji scenes: index outside 0 to {self.length}")
        return index.astype(np.uint64)

    def _meaning(self, index: Words) -> Meaning:
        """Draws until every scene shows a combination of this split; each scene draws from a stream of its own."""
        two = two_objects(self.seed, index, self.objects)
        meaning = self.vocabulary.draw(self.seed, 0, index, two)
        wrong = np.flatnonzero(self._outside(meaning))
        attempt = 0
        while wrong.size:
            attempt += 1
            again = self.vocabulary.draw(self.seed, attempt, index[wrong], two[wrong])
            meaning = meaning.replaced(wrong, again)
            wrong = wrong[self._outside(again)]
        return meaning

    def _outside(self, meaning: Meaning) -> NDArray[np.bool_]:
        """True where a combination belongs to the other split."""
        return self.vocabulary.held_out(meaning, self.hold_out) != (self.split == "held_out")

    def _layout(self, index: Words, meaning: Meaning) -> Layout:
        """Places the sprites in their cells: the whole canvas, or its halves side by side or one above the other."""
        relation = meaning.relation[:, None]
        beside, stacked = relation == 0, relation == 1
        cell = np.where(relation >= 0, 0.5, 1.0)
        least, greatest = self.scale
        share = np.stack([uniforms(self.seed, f"scale {slot}", index) for slot in (0, 1)], axis=1)
        width = cell * (least + (greatest - least) * share)
        place = np.array([[0.25, 0.75]])
        x = np.where(beside, place, 0.5) + self._shift("x", index, np.where(beside, 0.5, 1.0) - width)
        y = np.where(stacked, place, 0.5) + self._shift("y", index, np.where(stacked, 0.5, 1.0) - width)
        flip = np.stack([uniforms(self.seed, f"flip {slot}", index) < 0.5 for slot in (0, 1)], axis=1)
        x, y, width = ((self.size * a).astype(np.float32) for a in (x, y, width))
        return Layout(x, y, width, flip & self._mirrorable[meaning.objects])

    def _shift(self, axis: str, index: Words, room: NDArray[np.float64]) -> NDArray[np.float64]:
        """`(N, 2)` displacement along an axis, within the jitter and within the `room` `(N, 2)` left in the cell."""
        sway = np.stack([signed_uniforms(self.seed, f"{axis} {slot}", index) for slot in (0, 1)], axis=1)
        return sway * np.minimum(self.jitter, room / 2)

    def _compose(self, meaning: Meaning, layout: Layout) -> Tensor:
        """`(B, 3, S, S)` in [-1, 1]."""
        canvas = self._rows[torch.from_numpy(meaning.background)].expand(-1, -1, -1, self.size)
        canvas = over(self._drawn(meaning, layout, 0, np.arange(len(meaning.background))), canvas)
        second = np.flatnonzero(meaning.relation >= 0)
        if second.size:
            rows = torch.from_numpy(second)
            canvas[rows] = over(self._drawn(meaning, layout, 1, second), canvas[rows])
        return canvas.round_().div_(127.5).sub_(1.0)

    def _drawn(self, meaning: Meaning, layout: Layout, slot: int, rows: NDArray[np.int64]) -> Tensor:
        """`(len(rows), 4, S, S)`: the sprite of `slot` in the scenes at `rows`."""
        sprites = self._sprites[torch.from_numpy(meaning.objects[rows, slot])].float()
        x, y, width, flip = (torch.from_numpy(a[rows, slot]) for a in (layout.x, layout.y, layout.width, layout.flip))
        return draw(sprites, x, y, width, flip, self.size)

    def _check_arguments(self) -> None:
        if self.size < 8 or self.size % 8:
            raise UserError(f"emoji size: found {self.size}, allowed are multiples of 8 from 8 on")
        if self.objects not in ((1,), (2,), (1, 2)):
            raise UserError(f"emoji objects: found {self.objects}, allowed are 1, 2 and (1, 2)")
        if self.objects != (1,) and len(self.vocabulary.sprites) < 2:
            raise UserError("emoji classes: found one sprite, scenes of two objects need at least two")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"emoji scale: found {self.scale}, allowed are two rising numbers in (0, 1]")
        if not 0 <= self.jitter <= 1:
            raise UserError(f"emoji jitter: found {self.jitter}, allowed are 0 to 1")
        if not 0 <= self.hold_out < 1:
            raise UserError(f"emoji hold_out: found {self.hold_out}, allowed are 0 to below 1")
        if self.split not in SPLITS:
            raise UserError(
                f"emoji split: found {self.split!r}, allowed are {SPLITS}{did_you_mean(self.split, SPLITS)}"
            )
        if self.length is not None and self.length < 1:
            raise UserError(f"emoji length: found {self.length}, allowed are 1 and more, or none for an endless set")

    def _check_combinations(self) -> None:
        """Refuses a split that could never show a scene, which would be searched for without end."""
        for count in self.objects:
            if count == 2 and len(self.vocabulary.sprites) > _ENUMERABLE:
                continue
            every = self.vocabulary.every_pair() if count == 2 else self.vocabulary.every_single()
            if self._outside(every).all():
                raise UserError(
                    f"emoji split: {self.split!r} holds none of the {len(every.background)} combinations of "
                    f"{count} object(s) and a background at hold_out={self.hold_out:g}; take more classes or "
                    "backgrounds, or with hold_out=0 the train split under another seed"
                )


def emoji32(*, seed: int = 0, length: int | None = None) -> EmojiScenes:
    """The main job's data set: 24 hand-picked emoji, one a scene, 32 px, four backgrounds, light and dark.

    Nothing is held out, for a class-conditional model has no caption to generalise over; a reference set to measure
    against is the same set with another seed.
    """
    return EmojiScenes(
        size=32,
        classes=EMOJI32_CLASSES,
        objects=1,
        backgrounds=EMOJI32_BACKGROUNDS,
        scale=(0.8, 0.95),
        jitter=1.5 / 32,
        flip=False,
        hold_out=0.0,
        seed=seed,
        length=length,
    )
