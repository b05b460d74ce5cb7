"""`fewstep train --dry-run`: what a run needs, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from accelerate import Accelerator

from fewstep.commands.configs import find
from fewstep.commands.json_file import require_writable, write_json
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.errors import RunError
from fewstep.training.assemble import assemble
from fewstep.training.footprint import Footprint, footprint, remembered_numbers
from fewstep.training.opening import open_sources

METHOD = (
    "weights, moments and averages are exact; activations are what autograd keeps for one micro-batch, counted on "
    "torch's meta device with a fused attention kernel; what a layer needs only while it runs is not in it"
)


def run(path: Path, overrides: Sequence[str], json: Path | None) -> None:
    """Print the footprint of the config at `path` as a table, and write it as JSON."""
    require_writable("--json", json)
    config = load(find(path), overrides)
    found = measured(config)
    for line in table(found, config):
        typer.echo(line)
    if json is not None:
        write_json(json, {**asdict(found), "method": METHOD})


def measured(config: RunConfig) -> Footprint:
    """The footprint of a run on one process.

    Raises:
        UserError: the config is one that training would refuse.
        RunError: the method reads a number that the meta device does not have.
    """
    anywhere = {
        "memory": config.memory.model_copy(update={"offload": False, "attention": "auto"}),
        "optim": config.optim.model_copy(update={"kind": "adamw"}),
        "train": config.train.model_copy(update={"compile": "none", "compile_players": {}}),
    }  # what this machine may lack
    run = config.model_copy(update=anywhere)
    try:
        with remembered_numbers():
            return footprint(assemble(run, open_sources(run, "meta"), Accelerator(cpu=True)), config.optim)
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        raise RunError(f"--dry-run: {config.method.name} cannot be followed without numbers: {text}") from error


def table(found: Footprint, config: RunConfig) -> Iterator[str]:
    """The figures for people."""
    micro = config.data.batch_size // config.train.accumulate
    yield f"{config.method.name}, {config.train.precision}, micro-batch {micro} on one process"
    beside = {"beside": found.other_parameters} if found.other_parameters else {}
    yield from _rows("weights", {**found.parameters, **beside})
    yield from _rows("optimizer", found.optimizer)
    yield from _rows("averages", found.averages)
    for name, turn in found.turns.items():
        yield f"turn {name}: trains {', '.join(turn.trains)}"
        yield from (f"  {count:>8} samples  {what}" for what, count in turn.evaluations.items())
        yield f"  {_mib(turn.activations)}  activations"
        yield f"  {_mib(turn.gradients)}  gradients"
    yield f"{_mib(found.resident)}  weights, optimizer and averages"
    yield f"{_mib(found.peak)}  with the largest turn: what the device needs, and a little more"
    yield f"({METHOD})"
    if config.memory.offload:
        yield "(memory.offload: what a turn does not use waits on the host, so the device needs less than this)"


def _rows(title: str, values: Mapping[str, int]) -> Iterator[str]:
    yield title
    yield from (f"  {_mib(size)}  {name}" for name, size in values.items())


def _mib(size: int) -> str:
    return f"{size / 2**20:10.1f} MiB"
