"""One sampling, asked of an exported pipeline and repeated by fewstep's own sampler from what the pipeline told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.diffusion.solvers import Sampler, sample
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import GUIDANCE, middle
from fewstep.models.load import resolve

from .manifest import Manifest, modules
from .recipes import RECIPES


@dataclass(frozen=True)
class Probe:
    """What a pipeline is asked for, as JSON values and tensors.

    Attributes:
        call: its arguments that are no tensors.
        tensors: the others: made-up embeddings in place of a prompt.
        facts: what else the process that asks it must know.
    """

    call: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def write(self, work: Path) -> None:
        """Into the folder that the process reads."""
        facts = {**self.facts, "call": dict(self.call), "tensors": list(self.tensors)}
        (work / "call.json").write_text(json.dumps(facts))
        if self.tensors:
            save_file(dict(self.tensors), work / "in.safetensors")


def probe_of(student: NetworkDenoiser, manifest: Manifest, batch: int, seed: int) -> Probe:
    """A call of the manifest's pipeline for `batch` samples."""
    recipe, family = RECIPES[manifest.pipeline], student.family
    config: Any = getattr(student.network, "config", {})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in recipe.embeddings.items():
        size = (batch, *shape(config))
        mask = name.endswith("mask")
        tensors[name] = torch.ones(size, dtype=torch.int64) if mask else torch.randn(size, generator=generator)
    words: dict[str, Any] = {**recipe.raw, **manifest.call}
    if recipe.sized:
        words["batch_size"] = batch
    if student.null is not None and student.null.labels is not None:
        words["class_labels"] = [i % int(student.null.labels) for i in range(batch)]
    facts = {
        "seed": seed,
        "component": manifest.component,
        "skip": [family.sample, family.time, "return_dict"],
        "missing": manifest.missing,
        "listed": ["prompt_embeds"] if family.listed else [],
        "imports": modules(manifest),
        "base": None if manifest.base is None else str(resolve(manifest.base).resolve()),
        "scheduler": manifest.scheduler.rpartition(".")[::2],
        "adapters": manifest.adapters,
    }
    return Probe(words, tensors, facts)


@dataclass(frozen=True)
class Answer:
    """What a pipeline did.

    Attributes:
        samples: `(B, *)`, as its scheduler made them last.
        noise: `(B, *)`, as its scheduler was given it first.
        told: the arguments of its network beside x and time.
        generator: state of the generator that was handed to it, once the noise was drawn.
        everywhere: state of torch's global generator then.
    """

    samples: Tensor
    noise: Tensor
    told: Mapping[str, Any]
    generator: Tensor
    everywhere: Tensor

    @staticmethod
    def read(work: Path) -> Answer:
        """From the folder that the process wrote into."""
        tensors = load_file(work / "out.safetensors")
        heard = json.loads((work / "heard.json").read_text())
        told = {key: _value(one, tensors) for key, one in heard.items()}
        return Answer(tensors["samples"], tensors["noise"], told, tensors["generator"], tensors["global"])

    def renoising(self, manifest: Manifest) -> torch.Generator:
        """The generator of the fresh noise between the steps, as it was after the first noise."""
        generator = torch.Generator()
        if RECIPES[manifest.pipeline].seeded:
            generator.set_state(self.generator)
        elif manifest.scheduler in manifest.own:
            generator.manual_seed(0)
        else:
            generator.set_state(self.everywhere)
        return generator

    @torch.no_grad()
    def repeated(self, student: NetworkDenoiser, sampler: Sampler, manifest: Manifest) -> Tensor:
        """Samples `(B, *)` by fewstep's sampler, from the same noise, under the same condition."""
        condition = Condition(shared=self.told)
        if GUIDANCE in student.graft.names and student.guidance_range is not None:
            scale = torch.full((len(self.noise),), middle(student.guidance_range))
            condition = condition.with_scalar(GUIDANCE, scale)
        unit = student.process.prior(torch.ones(()), sampler.times[0])
        return sample(student, sampler, self.noise / unit, condition, self.renoising(manifest))


def _value(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    match told:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": inner}:
            return {key: _value(one, tensors) for key, one in inner.items()}
        case {"list": inner}:
            return [_value(one, tensors) for one in inner]
    return told["value"]
