"""`fewstep export`: a run's averaged student as an ordinary diffusers pipeline, checked where fewstep is not there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from fewstep.errors import UserError
from fewstep.pipelines.check import ReloadFailure
from fewstep.pipelines.export import export_run
from fewstep.pipelines.hub import check_name, push
from fewstep.pipelines.manifest import Manifest, read_manifest
from fewstep.pipelines.plan import Form

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """The command's options.

    Attributes:
        verify: whether to reload it in a fresh process.
        dtype: of the weights, by torch's name.
        max_shard_size: of a file, as "5GB".
        lora: adapters alone.
        metrics: a JSON file with figures for the card.
        hub: the repository to upload to.
    """

    verify: bool
    dtype: str
    max_shard_size: str
    lora: bool
    metrics: Path | None
    hub: str | None


def run(source: Path, out: Path, wanted: Wanted) -> None:
    """Export, and say how far reloaded samples are from fewstep's; a difference ends the program with code 1."""
    form = Form(_DTYPES[wanted.dtype], _size(wanted.max_shard_size), wanted.lora)
    metrics = None if wanted.metrics is None else _figures(wanted.metrics)
    if wanted.hub is not None:
        check_name(wanted.hub)
    try:
        figure = export_run(source, out, wanted.verify, metrics, form)
    except ReloadFailure as failure:
        typer.echo(f"failed: {failure}; the folder is kept for a look", err=True)
        raise typer.Exit(1) from failure
    manifest = read_manifest(out)
    for note in _notes(manifest):
        typer.echo(note)
    typer.echo(f"wrote {out} ({_told(figure, manifest)})")
    if wanted.hub is not None:
        typer.echo(f"uploaded to {push(out, wanted.hub)}")


def _notes(manifest: Manifest) -> list[str]:
    """What whoever loads the folder must know."""
    notes = []
    if manifest.missing:
        notes.append(f"missing in the teacher's folder, and so here: {', '.join(manifest.missing)}; they load as None")
    if manifest.own:
        names = ", ".join(name.rpartition(".")[2] for name in manifest.own)
        notes.append(f"loads where fewstep is installed and imported, for its {names}; the card shows how")
    return notes


def _told(figure: float | None, manifest: Manifest) -> str:
    if figure is None:
        return "not checked"
    where = "in a fresh process" if manifest.own else "without fewstep"
    return f"reloaded {where}, samples differ by at most {figure:.1e}"


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text):
        raise UserError(f"--max-shard-size: {text!r} given; a number and KB, MB, GB or TB are needed, as in 5GB")
    return text


def _figures(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--metrics: {path} is no JSON file; `fewstep evaluate --json` writes one") from error
    if not isinstance(values, dict):
        raise UserError(f"--metrics: {path} holds no figures by name; `fewstep evaluate --json` writes such a file")
    return values
