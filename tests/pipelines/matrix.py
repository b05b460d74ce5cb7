"""Runs of every family on made-up latents: trained, resumed and exported, ready to be reloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewstep import registry
from fewstep.config import RunConfig
from fewstep.data.samples import Samples
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.encoder import open_encoder
from fewstep.models.load import load_denoiser
from fewstep.pipelines.card import CardFacts
from fewstep.pipelines.check import Exported, allowed
from fewstep.pipelines.export import export_student
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.plan import Form
from fewstep.pipelines.recipes import RECIPES
from fewstep.training import checkpoint
from fewstep.training.assemble import EMA
from fewstep.training.opening import Sources
from tests import tiny_pipelines
from tests.training.runs import assert_same, begin, config, everything, go, moved

METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2", "critic_updates": 1},
    "consistency": {"name": "consistency", "intervals": 8, "solver": "ddim"},
    "two_time": {"name": "flow_map", "kind": "psd", "diagonal": 0.5},
}
RANK = 2
CAPTIONS = ("a red cat", "a blue dog on a hill")


@dataclass(frozen=True)
class Latents:
    """Eight noisy samples of one shape, whose conditions go by turns."""

    shape: tuple[int, ...]
    condition: Condition
    classes: tuple[str, ...] = ()
    length: int = 8

    def batch(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`, each from a seed of its own."""
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(i)) for i in indices]
        turns = torch.tensor(indices) % 2
        return Samples(0.5 * torch.stack(rows), condition=self.condition.rows(turns))


@dataclass(frozen=True)
class Teacher:
    """A tiny pipeline on disk."""

    name: str
    folder: Path

    @staticmethod
    def saved(name: str, folder: Path) -> Teacher:
        """The pipeline of that name, written below `folder`."""
        return Teacher(name, tiny_pipelines.saved(name, folder))

    @cached_property
    def latents(self) -> Latents:
        """What a run of it learns from."""
        if self.name == "ddpm":
            return Latents((3, 8, 8), Condition.none())
        if self.name == "dit":
            return Latents((4, 8, 8), Condition.of_labels(torch.tensor([3, 7])))
        encoder = open_encoder(str(self.folder), side=tiny_pipelines.SIDE, call=tiny_pipelines.facts(self.name))
        frames = (2,) if self.name == "wan" else ()
        shape = encoder.latent_shape(tiny_pipelines.SIDE)
        shape = (shape[0], *frames, *shape[-2:]) if frames else shape
        return Latents(shape, encoder.prompts(CAPTIONS))

    def sources(self, lora: bool) -> Sources:
        """Freshly loaded, with a student that is the teacher."""
        teacher = load_denoiser(str(self.folder)).sized(self.latents.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = teacher.lora_view("student", RANK) if lora else teacher.copy()
        return Sources(self.latents, teacher, student)

    def run(self, method: str, lora: bool) -> RunConfig:
        """Three steps of two samples."""
        words = dict(METHODS[method])
        if lora and "fake_score_lora" in registry.get(words["name"]).Config.model_fields:
            words["fake_score_lora"] = RANK
        student = {"steps": 2, "lora": RANK if lora else None}
        return config(words, student=student, data={"batch_size": 2}, train={"steps": 3}, optim={"lr": 1e-3})

    def exported(self, method: str, lora: bool, room: Path) -> Exported:
        """Three steps, the last one after a checkpoint and in a fresh state as well; the averaged student's export."""
        run, student = self.run(method, lora), self._trained(method, lora, room / "checkpoints")
        sampler = registry.get(run.method.name).sampler(run.method, student.process, run.student.steps)
        plain = not student.graft.names and RECIPES[_pipeline(self.folder)].lora
        facts = CardFacts(run.method.name, registry.get(run.method.name).paper, teacher=str(self.folder))
        export_student(student, sampler, self.folder, room / "out", facts, Form(lora=lora and plain))
        return Exported(room / "out", student, sampler)

    def _trained(self, method: str, lora: bool, folder: Path) -> NetworkDenoiser:
        run = self.run(method, lora)
        first, second = begin(run, self.sources(lora)), begin(run, self.sources(lora))
        before = everything(first)
        go(first, 2)
        checkpoint.save(folder, first)
        checkpoint.restore(checkpoint.list_checkpoints(folder)[-1], second)
        go(first)
        go(second)
        assert_same(everything(first), everything(second))
        assert "student" in moved(before, everything(second))
        average = second.method.averages[EMA]
        for name, parameter in average.source.parameters.items():
            parameter.data = average.shadow[name]
        return second.method.student


def _pipeline(folder: Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


def limit(one: Exported) -> float:
    """Of the difference between two processes."""
    return allowed(one.student, one.sampler)


def needs_fewstep(one: Exported) -> bool:
    """Whether the export names fewstep's classes."""
    return bool(read_manifest(one.out).own)
