"""A folder to make mistakes in: tiny teachers, image folders, configs and runs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler
from PIL import Image

from fewstep.cli import main
from tests import tiny

CLASSES = 4


def write_teacher(folder: Path, size: int = 8, classes: int = CLASSES) -> Path:
    """A pipeline folder: a class-conditional UNet of `size` × `size` × 3 and an ε-prediction scheduler."""
    tiny.unet2d_classes(size, classes, 3).save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "X", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_images(folder: Path, classes: int = CLASSES, size: int = 8, each: int = 2) -> Path:
    """An image folder with sub-folders `class0`, `class1`, ..., of plain colours."""
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            colour = (60 * label % 256, 100 * i % 256, 128)
            Image.new("RGB", (size, size), colour).save(folder / f"class{label}" / f"{i}.png")
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        else:
            code = 0
    return Outcome(code, out.getvalue(), err.getvalue())


class Lab:
    """One test's folder, beside a teacher and images that all tests share."""

    def __init__(self, folder: Path, teacher: Path, images: Path, trained: Path) -> None:
        self.folder, self.teacher, self.images, self.trained = folder, teacher, images, trained

    def values(self, method: str = "dmd2") -> dict[str, Any]:
        """A run that works, in two steps."""
        return {
            "run": {"dir": str(self.folder / "run")},
            "teacher": {"path": str(self.teacher)},
            "method": {"name": method},
            "data": {"name": "folder", "path": str(self.images), "size": 8, "batch_size": 4},
            "train": {"steps": 2, "threads": 1, "sample_every": 0, "checkpoint_every": 1},
        }

    def config(self, method: str = "dmd2") -> str:
        return self.text(json.dumps(self.values(method)))

    def train(self, *overrides: str, method: str = "dmd2") -> list[str]:
        """The working run with changes."""
        return ["train", self.config(method), *overrides]

    def text(self, text: str, name: str = "run.yaml") -> str:
        return self.data(text.encode(), name)

    def data(self, content: bytes, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def broken_teacher(self, change: Callable[[Path], object]) -> list[str]:
        """The working run on a copy of the teacher that `change` has been at."""
        copy = Path(shutil.copytree(self.teacher, self.folder / "broken"))
        change(copy)
        return self.train(f"teacher.path={copy}")

    def broken_images(self, change: Callable[[Path], object]) -> list[str]:
        """The working run on a copy of the images that `change` has been at."""
        copy = Path(shutil.copytree(self.images, self.folder / "pictures"))
        change(copy)
        return self.train(f"data.path={copy}")

    def mixture(self, **changes: Any) -> list[str]:
        """A verification on a mixture file with changes."""
        table = {"weights": [0.5, 0.5], "means": [[0.0], [1.0]], "stds": [0.1, 0.1], "labels": None}
        return ["verify", "dmd2", "--mixture", self.text(json.dumps(table | changes), "mixture.json")]

    def resumed(self, *overrides: str) -> list[str]:
        """The run that has already been trained, with changes."""
        copy = Path(shutil.copytree(self.trained, self.folder / "again"))
        values = json.loads((copy / "config.json").read_text())
        values["run"]["dir"] = str(copy)
        return ["train", self.text(json.dumps(values)), *overrides]


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def other_scheduler(folder: Path) -> None:
    """Make the teacher's scheduler one that fewstep refuses."""
    CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")


def train_once(folder: Path, teacher: Path, images: Path) -> Path:
    """A run of two steps, with its checkpoints."""
    lab = Lab(folder, teacher, images, folder)
    threads = torch.get_num_threads()
    try:
        outcome = call(*lab.train())
    finally:
        torch.set_num_threads(threads)
    assert outcome.code == 0, outcome.err
    return folder / "run"
