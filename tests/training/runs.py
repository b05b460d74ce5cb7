"""Whole runs in milliseconds: a small network on the five modes of a plane, distilled from their exact denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.data.mixture import MixtureSet
from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.gaussian import five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.assemble import assemble
from fewstep.training.loop import Report, TrainState, train
from fewstep.training.opening import Sources

MADE = "made here"
"""For a method that learns from stored pairs: `config` writes some into the run's folder."""

METHODS: dict[str, dict[str, Any]] = {
    "pretrain": {"name": "pretrain"},
    "dmd2": {"name": "dmd2", "critic_updates": 2},
    "dmd2_gan": {"name": "dmd2", "critic_updates": 2, "gan_weight": 0.1, "r1_weight": 1.0},
    "consistency": {"name": "consistency", "intervals": 8, "target": "ema", "target_decay": 0.8},
    "sid": {"name": "sid"},
    "swiftbrush": {"name": "swiftbrush", "fake_score_lora": None, "guidance_range": [1.0, 3.0]},
    "f_distill": {"name": "f_distill", "critic_updates": 2, "ratio_bins": 2, "gan_weight": 0.1},
    "gdd": {"name": "gdd", "train": "innate", "adversarial_loss": "relativistic", "r1_weight": 1.0, "r2_weight": 1.0},
    "adversarial": {"name": "adversarial", "backbone": "trained", "r1_weight": 1.0, "distillation_weight": 1.0},
    "self_adversarial": {"name": "self_adversarial", "critic_updates": 2, "most_steps": 3},
    "scm": {"name": "scm"},
    "scm_data": {"name": "scm", "teacher": False, "derivative": "central_difference"},
    "flow_map": {"name": "flow_map", "diagonal": 0.5},
    "flow_map_esd": {"name": "flow_map", "kind": "esd", "teacher": False, "diagonal": 0.5},
    "flow_map_psd": {"name": "flow_map", "kind": "psd", "split": "midpoint", "diagonal": 0.5},
    "meanflow": {"name": "meanflow"},
    "meanflow_data": {"name": "meanflow", "teacher": False, "omega": 1.5, "derivative": "central_difference"},
    "progressive": {"name": "progressive", "start_steps": 8},  # stages of 2, 3 and 2 steps
    "reflow": {"name": "reflow", "pairs": MADE, "times": "u_shaped", "one_step_share": 0.3},
    "scfm": {"name": "scfm", "intervals": 8, "target_decay": 0.8},
    "scflow": {"name": "scflow", "warmup": 0.3, "backbone": "trained"},
    "guidance": {"name": "guidance", "guidance_range": [1.0, 5.0]},
    "agd": {"name": "agd", "guidance_range": [1.0, 4.0], "rank": 4, "width": 8, "trajectory_steps": 3},
    "plug_and_play": {"name": "plug_and_play", "guidance_range": [1.0, 4.0], "channels": 4, "width": 8},
    "gft": {"name": "gft", "guidance_range": [1.0, 5.0]},
    "model_guidance": {"name": "model_guidance", "scale": 2.0, "target_decay": 0.8},
}


def vector_denoiser(seed: int = 0, width: int = 16) -> NetworkDenoiser:
    """A labelled VectorNetwork on flow matching."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VectorNetwork(VectorConfig(2, 5, (0.0, 0.0), 0.7, width=width, depth=1))
        torch.nn.init.normal_(network.last.weight, std=0.1)
    return make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))


def sources(network_teacher: bool = False) -> Sources:
    """Five labelled modes, their exact denoiser (or a network) as the teacher, a network as the student."""
    mixture, student = five_modes(labelled=True), vector_denoiser()
    teacher = vector_denoiser() if network_teacher else mixture.denoiser(Flow())
    return Sources(MixtureSet(mixture), teacher, student)


def config(method: Mapping[str, Any], folder: Path = Path("run"), **sections: Mapping[str, Any]) -> RunConfig:
    """A run of a few steps; each section takes what is told over these settings."""
    stored = {"pairs": made_pairs(folder / "pairs.safetensors")} if method.get("pairs") == MADE else {}
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder)},
        "method": {**method, **stored},
        "data": {"name": "mixture", "batch_size": 8},
        "optim": {"lr": 1e-2},
        "train": {"steps": 7, "ema": 0.9, "sample_every": 0},
    }
    return parse(with_sections(values, sections))


def with_sections(values: dict[str, dict[str, Any]], sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A run's values; each section takes what is told over them."""
    return {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}


def made_pairs(path: Path, shape: tuple[int, ...] = (2,), classes: int = 5) -> str:
    """Pairs that nothing made, as a file; of the five labelled modes where no more is said."""
    noise, x0 = torch.randn(2, 64, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    save_pairs(path, Pair(noise, x0, Condition.of_labels(torch.arange(64) % classes)))
    return str(path)


def begin(run: RunConfig, start: Sources | None = None) -> TrainState:
    """The state at step 0, every object new."""
    return assemble(run, start or sources(), Accelerator(mixed_precision=precision(run)))


def precision(run: RunConfig) -> str:
    return "no" if run.train.precision == "fp32" else "bf16"


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
