"""From a text-to-image pipeline and captioned pictures to a few-step pipeline, by config alone.

    python examples/text_to_image.py PIPELINE PICTURES OUT CONFIG [--size 1024] [--online] [KEY=VALUE ...]

PIPELINE is a diffusers folder or hub name: SD 1.5, SDXL, SD3, FLUX, PixArt, Sana and others. PICTURES is a folder of
images with captions (`metadata.jsonl`, or a `.txt` beside each). CONFIG is a shipped file of `configs/text_to_image/`,
or one of yours. OUT gets `cache/`, `run/` and `pipeline/`, which `DiffusionPipeline.from_pretrained` loads. The same
command again goes on where it was interrupted. With --online there is no cache: pictures and captions are encoded while
training, by a VAE and text encoders that rest in the host's memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Cache, train, export."""
    asked = _arguments()
    cache, run = asked.out / "cache", asked.out / "run"
    data = (f"data.path={cache}",)
    if asked.online:
        data = (f"data.path={asked.pictures}", "data.name=captions", f"data.size={asked.size}", "memory.encoders=host")
    else:
        _fewstep("cache", asked.pipeline, cache, "--data", "captions", "--path", asked.pictures, "--size", asked.size)
    _fewstep("train", asked.config, f"teacher.path={asked.pipeline}", f"run.dir={run}", *data, *asked.changes)
    _fewstep("export", run, asked.out / "pipeline")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("config")
    parser.add_argument("changes", nargs="*", help="of the config, as train.steps=1000")
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures in pixels")
    parser.add_argument("--online", action="store_true", help="encode while training, without a cache")
    return parser.parse_intermixed_args()


def _fewstep(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "fewstep", *map(str, words)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
