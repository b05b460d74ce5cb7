"""Prompts without pictures, for methods that learn from the teacher alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.captioned import one_line
from fewstep.data.samples import Samples
from fewstep.errors import UserError, did_you_mean


class PromptList:
    """The lines of a text file, blank ones left out.

    Such a set has the shape of pictures but none in it: its samples are NaN. A method that only asks for their shape
    trains; one that learns from them finds every gradient non-finite, and its run stops rather than learn from nothing.

    Args:
        path: the file, in UTF-8.
        size: height and width of the pictures that the prompts stand for.

    Raises:
        UserError: the file is missing, no text, or empty.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, *, size: int) -> None:
        self.size = size
        self.captions = read_prompts(path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.size, self.size)

    @property
    def length(self) -> int:
        """Number of prompts."""
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> Samples:
        """The prompts at `indices`, with images of NaN.

        Raises:
            IndexError: an index past the last prompt.
        """
        return Samples(no_pixels(len(indices), self.shape), captions=tuple(self.captions[i] for i in indices))


def no_pixels(count: int, shape: Sequence[int]) -> Tensor:
    """`(count, *shape)` of NaN: samples of which only the shape is known."""
    return torch.full((count, *shape), float("nan"))


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line.

    Raises:
        UserError: the file is missing, no text, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {str(path)!r} is no text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.path: {str(path)!r} cannot be read ({error.strerror}); a text file with one prompt a "
                        f"line is needed{did_you_mean(path.name, beside)}") from error  # fmt: skip
    prompts = tuple(prompt for prompt in map(one_line, lines) if prompt)
    if not prompts:
        raise UserError(f"data.path: {str(path)!r} holds no prompt")
    return prompts
