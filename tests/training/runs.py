"""Whole runs in milliseconds: a small network on the five modes of a plane, distilled from their exact denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.config import RunConfig, parse
from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.assemble import Sources, assemble
from fewstep.training.loop import Report, TrainState, train

METHODS: dict[str, dict[str, Any]] = {
    "pretrain": {"name": "pretrain"},
    "dmd2": {"name": "dmd2", "critic_updates": 2},
    "dmd2_gan": {"name": "dmd2", "critic_updates": 2, "gan_weight": 0.1, "r1_weight": 1.0},
    "consistency": {"name": "consistency", "intervals": 8, "target": "ema", "target_decay": 0.8},
}


def vector_denoiser(seed: int = 0) -> NetworkDenoiser:
    """A labelled VectorNetwork of width 16 on flow matching."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VectorNetwork(VectorConfig(2, 5, (0.0, 0.0), 0.7, width=16, depth=1))
        torch.nn.init.normal_(network.last.weight, std=0.1)
    return make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))


def sources(network_teacher: bool = False) -> Sources:
    """Five labelled modes, their exact denoiser (or a network) as the teacher, a network as the student."""
    mixture, student = five_modes(labelled=True), vector_denoiser()
    teacher = vector_denoiser() if network_teacher else mixture.denoiser(Flow())
    return Sources(MixtureSet(mixture), teacher, student)


def config(method: Mapping[str, Any], folder: Path = Path("run"), **sections: Mapping[str, Any]) -> RunConfig:
    """A run of a few steps; each section takes what is told over these settings."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder)},
        "method": dict(method),
        "data": {"name": "mixture", "batch_size": 8},
        "optim": {"lr": 1e-2},
        "train": {"steps": 7, "ema": 0.9, "sample_every": 0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse(values)


def begin(run: RunConfig, start: Sources | None = None) -> TrainState:
    """The state at step 0, every object new."""
    return assemble(run, start or sources(), Accelerator(mixed_precision=precision(run)))


def precision(run: RunConfig) -> str:
    return "bf16" if run.train.precision == "bf16" else "no"


def go(state: TrainState, steps: int | None = None) -> list[Report]:
    """Train `steps` more steps, or to the end."""
    reports = []
    for report in train(state):
        reports.append(report)
        if len(reports) == steps:
            break
    return reports


def everything(state: TrainState) -> dict[str, Tensor]:
    """All that must agree between two states that went the same way, by name."""
    out: dict[str, Tensor] = {}
    for name, player in state.method.players.items():
        for key, parameter in player.parameters.items():
            out[f"{name}/{key}"] = parameter.detach().clone()
            for kind, value in state.optimizers[name].adamw.state.get(parameter, {}).items():
                out[f"{name}/{key}/{kind}"] = value.clone()
    for name, average in state.method.averages.items():
        out |= {f"average {name}/{key}": value.detach().clone() for key, value in average.shadow.items()}
        out[f"average {name} updates"] = torch.tensor(average.updates)
    rng = state.rng.state()
    out |= {"rng device": rng.device.clone(), "rng host": rng.host.clone()}
    return out | {"samples": torch.tensor(state.loader.position), "step": torch.tensor(state.step)}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The players that have changed, by the first part of their parameters' names."""
    return {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])}


def weights(state: TrainState) -> dict[str, Tensor]:
    """Every player's parameters, as they are now."""
    players = state.method.players.items()
    return {f"{name}/{key}": p.detach().clone() for name, player in players for key, p in player.parameters.items()}
