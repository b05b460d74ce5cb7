"""Typed runs, continued: the sections that look on while a run trains, and change nothing of what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from fewstep.errors import did_you_mean
from fewstep.section import MAX_STEPS, Needs, Section, found, mistake_at


class Health(Section):
    """Figures and pictures that tell a healthy run from a sick one."""

    every: int = Field(default=100, ge=0)
    """Steps between readings, which go to `log.jsonl`, and to `health/` as pictures; 0 makes none."""
    samples: Annotated[int, Needs("every")] = Field(default=32, ge=8, multiple_of=4)
    """Student samples that are looked at; always of the same noise and conditions."""


_FIGURES = {"pr": ("precision", "recall", "density", "coverage")}  # of the metrics that are several


class Evaluate(Section):
    """Scores of the averaged student while it trains: those that `fewstep evaluate` gives for its checkpoint."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 makes none."""
    samples: Annotated[int, Needs("every")] = Field(default=1000, ge=3)
    """Images on each side."""
    reference: Annotated[str | None, Needs("every")] = None
    """The real set: a data set's name, a folder of images, or a kind of set and its place, as captions:FOLDER.

    None: the run's own, `data.name` or `data.path`.
    """
    prompts: Annotated[Path | None, Needs("every")] = None
    """File with the prompts, one a line, of a student that takes such. None: the captions of the real set."""
    features: Annotated[str, Needs("every")] = "classifier"
    """The feature network, by the name it has in `fewstep evaluate --features`."""
    metrics: Annotated[tuple[str, ...] | None, Needs("every")] = Field(default=None, min_length=1)
    """What is measured, by the names of `fewstep evaluate --metrics`. None: fd, kid, and accuracy where it can be."""
    steps: Annotated[int | None, Needs("every")] = Field(default=None, ge=1, le=MAX_STEPS)
    """Network evaluations per sample; None: the student's own number."""
    batch_size: Annotated[int, Needs("every")] = Field(default=100, ge=1)
    """Images made at a time; no figure depends on it."""
    seed: Annotated[int, Needs("every")] = Field(default=0, ge=0)
    """Of the noise and of the real samples."""
    best: Annotated[str | None, Needs("every")] = None
    """The metric by which the best checkpoint is kept, as a run of its own in `best/`. None: none is kept."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        figures = self.figures()
        if self.best is not None and self.best not in figures:
            text = f"{found(self.best)} given, evaluate.metrics measures {', '.join(figures)}"
            raise mistake_at("best", text + did_you_mean(self.best, figures))
        return self

    def figures(self) -> dict[str, str]:
        """What is measured, by figure: the name of the metric that it comes from."""
        names = self.metrics or ("fd", "kid", "accuracy")
        return {figure: name for name in names for figure in _FIGURES.get(name, (name,))}
