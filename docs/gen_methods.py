"""Writes the page "Methods" when the site is built: an entry a method, from its docstring and its config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

HEAD = """# Methods

Every method that this installation has registered, ours and third parties' alike. A config chooses one by its name
(`method.name`), and the fields below are what else its `method:` section may say. The code under each entry is the
whole class: read its step first.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `methods.md` to the site's pages."""
    from fewstep.registry import methods

    files.append(File.generated(config, "methods.md", content=page(methods())))
    return files


def page(methods: Mapping[str, type]) -> str:
    """The page's Markdown for methods by name, grouped by family."""
    families = sorted({str(method.family) for method in methods.values()})
    parts = [HEAD]
    for family in families:
        parts.append(f"## {family.capitalize()}\n\n")
        parts += [entry(name, method) for name, method in sorted(methods.items()) if str(method.family) == family]
    return "".join(parts)


def entry(name: str, method: Any) -> str:
    """One method: its paper, its fields, then its docstring and source by mkdocstrings."""
    fields = {key: field for key, field in method.Config.model_fields.items() if key != "name"}
    rows = "".join(row(key, field) for key, field in fields.items())
    table = f"| field | type | default | meaning |\n|---|---|---|---|\n{rows}" if rows else "It has no fields.\n"
    return f"### {name}\n\nPaper: {method.paper}\n\n{table}\n::: {method.__module__}.{method.__qualname__}\n\n"


def row(key: str, field: FieldInfo) -> str:
    """One field of a config as a row of the table."""
    kind = inspect.formatannotation(field.annotation).replace("typing.", "")
    default = "required" if field.is_required() else f"`{shown(field)}`"
    return f"| `{key}` | `{cell(kind)}` | {cell(default)} | {cell(field.description or '')} |\n"


def shown(field: FieldInfo) -> str:
    """A field's default as a config would write it."""
    value = field.get_default(call_default_factory=not field.default_factory_takes_validated_data)
    return "computed" if value is PydanticUndefined else "null" if value is None else str(value)


def cell(text: str) -> str:
    """Text that cannot end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
