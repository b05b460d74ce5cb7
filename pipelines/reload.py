"""Run as a script, by its path: load an export where fewstep cannot be imported, and make samples.

`python -P reload.py EXPORT WORK ...` reads `WORK/call.json` and `WORK/in.safetensors` of each export, and writes
`WORK/out.safetensors` and `WORK/heard.json`: the samples, the noise they were made from, and what the pipeline told its
network.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import inspect
import json
import sys
from pathlib import Path
from typing import Any


class _NoFewstep(importlib.abc.MetaPathFinder):
    """Whoever imports fewstep here fails, also where it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not there for a reloaded export")


class _Watch:
    """What goes through a pipeline's network and scheduler: the first call's arguments, and every state."""

    def __init__(self, pipeline: Any, network: Any, skip: list[str], generator: Any) -> None:
        import torch

        self.heard: dict[str, Any] | None = None
        self.tensors: dict[str, Any] = {}
        self._skip = skip
        step = pipeline.scheduler.step

        @functools.wraps(step)  # pipelines look at its arguments
        def recorded(model_output: Any, timestep: Any, sample: Any, *args: Any, **words: Any) -> Any:
            if "noise" not in self.tensors:
                states = {"generator": generator.get_state(), "global": torch.get_rng_state()}
                self.tensors |= {"noise": sample.contiguous().clone(), **{k: v.clone() for k, v in states.items()}}
            result = step(model_output, timestep, sample, *args, **words)
            self.tensors["samples"] = result[0].contiguous()
            return result

        pipeline.scheduler.step = recorded
        network.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _hear(self, network: Any, args: tuple[Any, ...], words: dict[str, Any]) -> None:
        if self.heard is None:
            told = inspect.signature(network.forward).bind(*args, **words).arguments
            self.heard = {key: self._flat(value) for key, value in told.items() if key not in self._skip}

    def _flat(self, value: Any) -> dict[str, Any]:
        """A value as JSON, its tensors beside it."""
        import torch

        if isinstance(value, torch.Tensor):
            name = f"told.{len(self.tensors)}"
            self.tensors[name] = value.clone().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": {key: self._flat(one) for key, one in value.items()}}
        if isinstance(value, list | tuple):
            return {"list": [self._flat(one) for one in value]}
        return {"value": value}


def make_samples(export: Path, work: Path) -> None:
    """Sample the export by its pipeline; the last state that its scheduler made is the sample."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from safetensors.torch import load_file, save_file

    logging.disable_progress_bar()
    told = json.loads((work / "call.json").read_text())
    for module in told["imports"]:
        importlib.import_module(module)
    pipeline: Any = DiffusionPipeline.from_pretrained(told["base"] or export, dtype=torch.float32, use_safetensors=True,
                                                      **dict.fromkeys(told["missing"]))  # fmt: skip
    if told["base"]:
        pipeline.load_lora_weights(export, weight_name=told["adapters"])
        module, name = told["scheduler"]
        pipeline.scheduler = getattr(importlib.import_module(module), name).from_pretrained(export / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(told["seed"])
    torch.manual_seed(told["seed"] + 1)
    network = getattr(pipeline, told["component"]).eval()
    watch = _Watch(pipeline, network, told["skip"], generator)
    tensors = load_file(work / "in.safetensors") if told["tensors"] else {}
    words = {name: list(value) if name in told["listed"] else value for name, value in tensors.items()}
    pipeline(**words, **told["call"], generator=generator)
    save_file(watch.tensors, work / "out.safetensors")
    (work / "heard.json").write_text(json.dumps(watch.heard))


def main(folders: list[Path]) -> None:
    """Exports and rooms by turns; those that need fewstep come last, when it has been seen that the others do not."""
    jobs = {room: export for export, room in zip(folders[::2], folders[1::2], strict=True)}
    needs = {room: bool(json.loads((room / "call.json").read_text())["imports"]) for room in jobs}
    away = _NoFewstep()
    sys.meta_path.insert(0, away)
    for room in sorted(jobs, key=lambda room: needs[room]):
        if not needs[room]:
            assert not any(module.partition(".")[0] == "fewstep" for module in sys.modules)
        elif away in sys.meta_path:
            sys.meta_path.remove(away)
        make_samples(jobs[room], room)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
