"""`fewstep export`: a run's averaged student as an ordinary diffusers pipeline, checked where fewstep is not there."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from fewstep.pipelines.check import ReloadFailure
from fewstep.pipelines.export import export_run

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(source: Path, out: Path, verify: bool, dtype: str) -> None:
    """Export, and say how far reloaded samples are from fewstep's; a difference ends the program with code 1."""
    try:
        figure = export_run(source, out, verify, dtype=_DTYPES[dtype])
    except ReloadFailure as failure:
        typer.echo(f"failed: {failure}; the folder is kept for a look", err=True)
        raise typer.Exit(1) from failure
    told = "not checked" if figure is None else f"reloaded without fewstep, samples differ by at most {figure:.1e}"
    typer.echo(f"wrote {out} ({told})")
