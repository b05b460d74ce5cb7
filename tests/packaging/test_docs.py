"""The Methods page is written from the classes themselves."""

from __future__ import annotations

import importlib.util

import pytest
from pydantic import BaseModel, ConfigDict

from tests.packaging.source import ROOT

pytest.importorskip("mkdocs", reason="the docs extra is not installed")


class Made:
    """A method for this test."""

    family = "distribution"
    paper = "Nobody 2024"

    class Config(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)

        name: str = "made"
        weight: float | None = 0.5
        """How much, from a | b."""
        steps: int
        """How often."""


def gen_methods():
    spec = importlib.util.spec_from_file_location("gen_methods", ROOT / "docs" / "gen_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_methods_entry_tells_its_fields():
    page = gen_methods().page({"made": Made})
    assert page.splitlines()[6:] == [
        "## Distribution",
        "",
        "### made",
        "",
        "Paper: Nobody 2024",
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
        "| `weight` | `float \\| None` | `0.5` | How much, from a \\| b. |",
        "| `steps` | `int` | required | How often. |",
        "",
        f"::: {Made.__module__}.Made",
        "",
    ]
