"""What an emoji scene shows: drawn from hashes of its index, told in a caption, held out by its meaning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.data.counter import Words, choices, mix, name_word, uniforms, word_of

RELATIONS = ("left of", "above")
_PHRASES = {"left of": "to the left of", "above": "above"}
_PLURAL = (
    "cherries grapes blueberries beans peanuts pancakes chopsticks jeans gloves socks shorts briefs eyeglasses "
    "sunglasses goggles scissors maracas books chains houses bubbles fireworks sparkles"
)
_PLURAL_PHRASES = (
    "french fries/clinking glasses/clinking beer mugs/paw prints/ballet shoes/shopping bags/prayer beads/control knobs/"
    "multiple musical notes/film frames/admission tickets/japanese dolls/nesting dolls/flower playing cards/"
    "theatre masks/linked paperclips/bookmark tabs/card index dividers/crossed swords/hot springs/two hearts/"
    "revolving hearts"
)
_UNCOUNTED = (
    "bread/flatbread/cooked rice/curry and rice/spaghetti/sushi/oden/dango/bacon/butter/popcorn/garlic/broccoli/coral/"
    "fog/wood/money with wings/pouring liquid/mount fuji/shaved ice"
)
_NO_ARTICLE = frozenset([*_PLURAL.split(), *_PLURAL_PHRASES.split("/"), *_UNCOUNTED.split("/")])
_SPOKEN_CONSONANT = ("eu", "one-", "uni")  # a european castle, a one-piece swimsuit, a unicorn
_SPOKEN_VOWEL = ("x-",)  # an x-ray


@dataclass(frozen=True)
class Meaning:
    """What N scenes show, without where exactly.

    Attributes:
        objects: `(N, 2)` sprite numbers; the second one is -1 where there is one object.
        relation: `(N,)` number in `RELATIONS`, of the first object to the second; -1 where there is one object.
        background: `(N,)` background number.
    """

    objects: NDArray[np.int64]
    relation: NDArray[np.int64]
    background: NDArray[np.int64]

    def rows(self, index: NDArray | slice) -> Meaning:
        """The scenes at `index`."""
        return Meaning(self.objects[index], self.relation[index], self.background[index])

    def replaced(self, index: NDArray, other: Meaning) -> Meaning:
        """A copy with the scenes at `index` taken from `other`."""
        objects, relation, background = self.objects.copy(), self.relation.copy(), self.background.copy()
        objects[index], relation[index], background[index] = other.objects, other.relation, other.background
        return Meaning(objects, relation, background)


@dataclass(frozen=True)
class Scene:
    """The facts of one scene.

    Attributes:
        objects: one or two sprite names.
        boxes: left, top and width of each drawn (square) sprite, in pixels.
        relation: of the first object to the second, "left of" or "above"; None for one object.
        background: its name.
    """

    objects: tuple[str, ...]
    boxes: tuple[tuple[float, float, float], ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        """One sentence, such as "a red apple to the left of a cat face on a blue background"."""
        first, *rest = (with_article(name) for name in self.objects)
        pair = "".join(f" {_PHRASES[str(self.relation)]} {name}" for name in rest)
        return f"{first}{pair} on {with_article(self.background)} background"


def with_article(name: str) -> str:
    """The name with "a" or "an", or bare where it is a plural or cannot be counted."""
    if name in _NO_ARTICLE:
        return name
    vowel = name[0] in "aeiou" and not name.startswith(_SPOKEN_CONSONANT)
    return f"{'an' if vowel or name.startswith(_SPOKEN_VOWEL) else 'a'} {name}"


class Vocabulary:
    """The names a set draws from, with the stable numbers that decide what is held out."""

    def __init__(self, sprites: tuple[str, ...], backgrounds: tuple[str, ...]) -> None:
        self.sprites = sprites
        self.backgrounds = backgrounds
        self._sprite_words = _words(sprites)
        self._background_words = _words(backgrounds)
        self._relation_words = _words(RELATIONS)

    def held_out(self, meaning: Meaning, share: float) -> NDArray[np.bool_]:
        """True for the `share` of all combinations (object, object, relation, background) that is never trained on.

        It depends on the names alone: not on the seed, nor on which other names a set draws from.
        """
        word = mix(self._sprite_words[meaning.objects[:, 0]])
        pair = mix(word ^ self._sprite_words[meaning.objects[:, 1]])
        pair = mix(pair ^ self._relation_words[meaning.relation])
        word = np.where(meaning.relation >= 0, pair, word)
        word = mix(word ^ self._background_words[meaning.background])
        return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share

    def draw(self, seed: int, attempt: int, index: Words, two: NDArray[np.bool_]) -> Meaning:
        """What the scenes at `index` `(N,)` show at this attempt, with two objects where `two` `(N,)` is true."""
        count = len(self.sprites)
        first = choices(seed, f"object {attempt}", index, count)
        other = (first + 1 + choices(seed, f"other object {attempt}", index, max(count - 1, 1))) % count
        relation = choices(seed, f"relation {attempt}", index, len(RELATIONS))
        background = choices(seed, f"background {attempt}", index, len(self.backgrounds))
        objects = np.stack([first, np.where(two, other, -1)], axis=1)
        return Meaning(objects, np.where(two, relation, -1), background)

    def every_single(self) -> Meaning:
        """All combinations of one object and a background."""
        first, background = _grid(len(self.sprites), len(self.backgrounds))
        return Meaning(np.stack([first, np.full_like(first, -1)], axis=1), np.full_like(first, -1), background)

    def every_pair(self) -> Meaning:
        """All combinations of two different objects, a relation and a background."""
        sizes = (len(self.sprites), len(self.sprites), len(RELATIONS), len(self.backgrounds))
        first, other, relation, background = _grid(*sizes)
        pairs = Meaning(np.stack([first, other], axis=1), relation, background)
        return pairs.rows(np.flatnonzero(first != other))


def two_objects(seed: int, index: Words, objects: tuple[int, ...]) -> NDArray[np.bool_]:
    """`(N,)` true where a scene has two objects; each number in `objects` is equally likely."""
    counts = np.array(objects)
    return counts[choices(seed, "object count", index, len(objects))] == 2


def signed_uniforms(seed: int, stream: str, index: Words) -> NDArray[np.float64]:
    """`(N,)` numbers in [-1, 1)."""
    return 2 * uniforms(seed, stream, index) - 1


def _words(names: tuple[str, ...]) -> Words:
    return np.concatenate([word_of(name_word(name)) for name in names])


def _grid(*sizes: int) -> list[NDArray[np.int64]]:
    return [axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")]
