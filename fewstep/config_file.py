"""From a YAML file and `key=value` words to a checked run, and back to plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fewstep.config import RunConfig
from fewstep.errors import UserError, did_you_mean
from fewstep.mistakes import explain


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file with `key.sub=value` words applied.

    Raises:
        UserError: the file is missing or no mapping, a word is no `key=value`, or a value is not allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = _read_yaml(path)
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), *map(_override, overrides))
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    return parse({str(key): value for key, value in resolved.items()})


def _read_yaml(path: Path) -> dict[Any, Any]:
    from omegaconf import OmegaConf
    from yaml import MarkedYAMLError, YAMLError

    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise UserError(f"config: {'a folder' if path.is_dir() else 'no file'} {str(path)!r}{near}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else f"{path}"
        tab = "; indent with spaces, not with tabs" if mark and _has_tab(path, mark.line) else ""
        raise UserError(f"{place}: {error.problem or 'no YAML'}{tab}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text in UTF-8 (byte {error.start})") from error
    except YAMLError as error:
        raise UserError(f"{path}: no YAML ({str(error).splitlines()[0]})") from error
    except OSError as error:  # OmegaConf says so of a file that holds one word or number
        reason = error.strerror or "a mapping of sections is needed, found a single value"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(values, dict) or not values:
        what = "an empty file" if not values else f"a {type(values).__name__}"
        raise UserError(f"{path}: a mapping of sections is needed ({', '.join(RunConfig.model_fields)}), found {what}")
    return values


def _has_tab(path: Path, line: int) -> bool:
    lines = path.read_text().splitlines()
    return line < len(lines) and "\t" in lines[line]


def _override(word: str) -> Any:
    """One `key=value` word as a nested mapping; its value is read as YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, _ = word.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {word!r}: give key=value, for example train.steps=200")
    try:
        return OmegaConf.from_dotlist([word])
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"override {word!r}: its value is no YAML; quote it") from error


def parse(values: Mapping[str, Any]) -> RunConfig:
    """A run from plain values; the first three mistakes become one line.

    Raises:
        UserError: a key is unknown, or a value is missing, of the wrong type, out of range or without effect.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(explain(error, RunConfig, values)) from error


def flat(config: BaseModel) -> dict[str, Any]:
    """A config as dotted keys and JSON values, for comparing two runs."""
    out: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            out[prefix] = value

    walk("", config.model_dump(mode="json"))
    return out
