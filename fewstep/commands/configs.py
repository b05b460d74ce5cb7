"""`fewstep configs`, and finding a shipped config by its name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import typer

from fewstep.errors import UserError, did_you_mean

LAUNCHER = "accelerate"


def shipped() -> dict[str, Path]:
    """The configs of runs inside the package, by name: `emoji32/dmd2`; those of `accelerate launch` are others."""
    root = Path(str(files("fewstep.configs")))
    found = (p for p in sorted(root.rglob("*.yaml")) if p.parent.name != LAUNCHER)
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in found}


def find(path: Path) -> Path:
    """A config file: `path` itself, or the shipped one of that name, with or without `configs/` and `.yaml`.

    Raises:
        UserError: neither exists.
    """
    if path.is_file():
        return path
    known = shipped()
    name = path.with_suffix("").as_posix().removeprefix("configs/")
    if path.is_dir():
        raise UserError(f"config: {str(path)!r} is a folder, a YAML file is needed")
    if name not in known:
        raise UserError(f"config: no file {str(path)!r}; shipped: {', '.join(known)}{_near(path, name, known)}")
    return known[name]


def _near(path: Path, name: str, known: Iterable[str]) -> str:
    """The nearest file beside the missing one, or the nearest shipped config."""
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return did_you_mean(str(path), beside) or did_you_mean(name, known)


def run() -> None:
    """Print the shipped configs' names."""
    for name in shipped():
        typer.echo(name)
