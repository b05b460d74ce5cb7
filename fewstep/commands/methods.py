"""`fewstep methods`: what is registered, and every setting of one method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from fewstep import registry


def run(name: str | None) -> None:
    """List all methods by family, or one method's fields with defaults and docs."""
    if name is None:
        _list()
    else:
        _one(name)


def _list() -> None:
    by_family: dict[str, list[str]] = {}
    for name, cls in registry.methods().items():
        by_family.setdefault(cls.family, []).append(f"  {name:<18}{_summary(cls)}\n  {'':<18}{cls.paper}")
    for family, lines in by_family.items():
        typer.echo(family)
        typer.echo("\n".join(lines))


def _one(name: str) -> None:
    cls = registry.get(name)
    typer.echo(f"{name}: {_summary(cls)}\n{cls.paper}\n")
    schema = cls.Config.model_json_schema()
    for key, field in cls.Config.model_fields.items():
        if key != "name":
            default = (
                "required"
                if field.is_required()
                else json.dumps(field.get_default(call_default_factory=True, validated_data={}))
            )
            allowed = _allowed(schema["properties"][key], schema.get("$defs", {}))
            typer.echo(f"  {key} = {default}{f'  ({allowed})' if allowed else ''}")
            typer.echo(f"      {' '.join((field.description or '').split())}")


def _allowed(schema: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """What a field takes, where that is a choice of words or a range; from its JSON schema."""
    schema = {**schema, **named.get(str(schema.get("$ref", "")).rpartition("/")[2], {})}
    if "anyOf" in schema:
        told = [text for one in schema["anyOf"] if (text := _allowed(one, named))]
        return " or ".join(told) if told != ["null"] else ""
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "null":
        return "null"
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join(f"{word} {schema[key]:g}" for key, word in words.items() if key in schema)


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]
