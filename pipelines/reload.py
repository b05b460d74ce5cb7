"""Run as a script, by its path: load an export where fewstep cannot be imported, and make samples.

`python -P reload.py EXPORT WORK` reads `WORK/call.json` and `WORK/in.safetensors` and writes `WORK/out.safetensors`.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class _NoFewstep(importlib.abc.MetaPathFinder):
    """Whoever imports fewstep here fails, also where it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not there for a reloaded export")


def make_samples(export: Path, work: Path) -> None:
    """Sample the export by its stock pipeline; the last state that its scheduler made is the sample."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from safetensors.torch import load_file, save_file

    logging.disable_progress_bar()
    told = json.loads((work / "call.json").read_text())
    without = dict.fromkeys(told["missing"])
    pipeline: Any = DiffusionPipeline.from_pretrained(export, dtype=torch.float32, **without)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    step = pipeline.scheduler.step

    def recorded(*args: object, **words: object) -> object:
        result = step(*args, **words)
        made.append(result[0])
        return result

    pipeline.scheduler.step = recorded
    tensors = load_file(work / "in.safetensors")
    generator = torch.Generator()
    generator.set_state(tensors.pop("generator"))
    torch.set_rng_state(tensors.pop("global"))
    pipeline(**tensors, **told["call"], generator=generator)
    save_file({"samples": made[-1].contiguous()}, work / "out.safetensors")


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoFewstep())
    assert not any(module.partition(".")[0] == "fewstep" for module in sys.modules)
    make_samples(Path(sys.argv[1]), Path(sys.argv[2]))
