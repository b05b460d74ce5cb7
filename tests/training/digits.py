"""A small run on real pictures: digits of 8 × 8 pixels, a network of some thousand weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from fewstep.commands.train import start
from fewstep.config_file import parse
from fewstep.training.loop import TrainState
from tests.tiny import alive, unet2d_classes
from tests.training.runs import with_sections


class Blocks(nn.Module):
    """The mean of each 2 × 2 pixels: features for `module:tests.training.digits.Blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 16)` of `(B, 3, 8, 8)` uint8."""
        return nn.functional.avg_pool2d(images[:, :1].float() * self.scale, 2).flatten(1)


def digits_teacher(folder: Path) -> Path:
    """A pipeline folder with a teacher that knows nothing."""
    if not folder.is_dir():
        network = alive(unet2d_classes(8, 10, 1))
        DDIMPipeline(network, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return folder


def digits_values(folder: Path, steps: int = 4, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run of `folder/run`; each section takes what is told over these settings."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(digits_teacher(folder.parent / "teacher"))},
        "method": {"name": "dmd2", "critic_updates": 1},
        "data": {"name": "digits", "batch_size": 4},
        "optim": {"lr": 1e-3},
        "train": {"steps": steps, "ema": 0.5, "sample_every": 0, "log_every": 1, "trackers": []},
        "health": {"every": 0},
    }
    return with_sections(values, sections)


def digits_run(folder: Path, steps: int = 4, **sections: Mapping[str, Any]) -> TrainState:
    """That run, begun or resumed."""
    return start(parse(digits_values(folder, steps, **sections)))
