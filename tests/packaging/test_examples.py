"""The examples, on pipelines whose shapes are those of the named models and whose weights are tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_pipelines
from tests.data.cache_lab import pictures

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "text_to_image.py"
SMALL = ("train.steps=3", "train.checkpoint_every=3", "train.precision=fp32", "data.batch_size=2", "data.workers=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "config", "more"),
    [
        ("sd15", "sd15_dmd2", ("method.critic_updates=1",)),
        ("sdxl", "sdxl_dmd2_lora", ("method.critic_updates=1",)),
        ("sd3", "flux_scfm", ("teacher.guidance=3.5",)),
        ("flux", "flux_scfm", ()),
        ("pixart", "pixart_swiftbrush", ()),
        ("sana", "sana_scm", ()),
        ("flux", "flux_scfm", ("--online",)),
    ],
)
def test_a_pipeline_folder_and_captions_are_enough(tmp_path, pipeline, config, more):
    from diffusers import DiffusionPipeline

    teacher = tiny_pipelines.saved(pipeline, tmp_path / "teacher")
    folders = teacher, pictures(tmp_path / "pictures", side=32), tmp_path / "out"
    told = [sys.executable, str(EXAMPLE), *map(str, folders), f"text_to_image/{config}", "--size", "32", *SMALL, *more]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    index = (tmp_path / "out" / "pipeline" / "model_index.json").read_text()
    if "fewstep" not in index:
        assert DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline") is not None
