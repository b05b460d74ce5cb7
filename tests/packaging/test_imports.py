"""Who may import whom: one hall, four wings, and methods that stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.packaging.source import ROOT, WINGS, Import, Source, registered, sources

WING_FILES = [source for source in sources() if source.wing]
HALL_FILES = [source for source in sources() if not source.wing]
DOORS = ("fewstep.cli", "fewstep.registry", "fewstep.commands")  # the only hall files that may know the wings


def place(value: object) -> str:
    return value.place if isinstance(value, Source) else str(value)


def wing_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] in WINGS:
        return parts[0]
    return parts[1] if parts[0] == "fewstep" and len(parts) > 1 and parts[1] in WINGS else None


def wing_faults(source: Source) -> list[str]:
    """What a file of a wing imports against the rules: another wing, itself by absolute name, the hall by dots."""
    faults = []
    for found in source.imports():
        target = wing_of(found.name)
        if target and target != source.wing:
            faults.append(f"line {found.line}: {found.name} is another wing")
        elif target and found.dots != 1:
            faults.append(f"line {found.line}: {found.name} is reached by one dot, or belongs in the hall")
        elif found.dots and not target:
            faults.append(f"line {found.line}: the hall ({found.name}) is imported by its absolute name")
    return faults


def hall_faults(source: Source) -> list[str]:
    """The wings that a file of the hall knows without being one of its doors."""
    if any(source.name == door or source.name.startswith(door + ".") for door in DOORS):
        return []
    return [f"line {found.line}: {found.name}" for found in source.imports() if wing_of(found.name)]


@pytest.mark.parametrize("source", WING_FILES, ids=place)
def test_a_wing_knows_the_hall_and_its_own_folder_only(source):
    assert wing_faults(source) == []


@pytest.mark.parametrize("source", HALL_FILES, ids=place)
def test_the_hall_knows_no_wing_but_at_its_doors(source):
    assert hall_faults(source) == []


def test_no_file_imports_a_method_but_through_the_registry():
    modules = set(registered().values())
    for source in sources():
        assert [one for one in source.imports() if one.name in modules] == [], source.place


@pytest.mark.parametrize("source", [one for one in sources() if one.path.name == "__init__.py"], ids=place)
def test_packages_import_nothing_by_themselves(source):
    assert [found.name for found in source.imports() if found.name != "__future__"] == []


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_refuses_its_bare_name(wing):
    done = subprocess.run(
        [sys.executable, "-c", f"import {wing}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"write `import fewstep.{wing}` instead" in done.stderr


def test_an_uninstalled_checkout_finds_the_wings():
    names = [f"fewstep.{wing}" for wing in WINGS]
    # -S leaves site-packages out, the editable install with it: what is found is found through the links.
    code = f"import importlib, fewstep; print(*(importlib.import_module(name).__name__ for name in {names}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == names


# The checks above must be able to fail: each line is a file's text and the faults that it has.
WING_CASES = [
    ("from fewstep.losses import score", 0),
    ("from .distribution import shared", 0),
    ("import torch", 0),
    ("from fewstep.evaluation import report", 2),
    ("from fewstep import pipelines", 1),
    ("from ..losses import score", 2),
    ("def late():\n    import configs", 1),
    ("import fewstep.methods.distribution", 1),
]


@pytest.mark.parametrize(("text", "faults"), WING_CASES)
def test_the_wing_rule_sees_its_faults(tmp_path, text, faults):
    path = tmp_path / "made.py"
    path.write_text(text)
    assert len(wing_faults(Source("fewstep.methods.made", path))) == faults


HALL_CASES = [
    ("fewstep.models.made", "from fewstep import methods", 1),
    ("fewstep.models.made", "from ..methods import training", 2),
    ("fewstep.models.made", "from .heads import Head", 0),
    ("fewstep.commands.made", "from fewstep.evaluation import report", 0),
]


@pytest.mark.parametrize(("name", "text", "faults"), HALL_CASES)
def test_the_hall_rule_sees_its_faults(tmp_path, name, text, faults):
    path = tmp_path / "made.py"
    path.write_text(text)
    assert len(hall_faults(Source(name, path))) == faults


def test_imports_are_resolved_from_the_file_that_says_them(tmp_path):
    path = tmp_path / "made.py"
    path.write_text("from ..a import b\nimport c.d")
    assert list(Source("fewstep.x.made", path).imports()) == [
        Import("fewstep.a", 2, 1),
        Import("fewstep.a.b", 2, 1),
        Import("c.d", 0, 2),
    ]


def test_every_registered_method_is_a_class_in_its_file():
    by_name = {source.name: source for source in sources()}
    for module in registered().values():
        assert module in by_name, f"pyproject.toml names {module}, which is not there"
        assert [node.name for node in by_name[module].tree.body if isinstance(node, ast.ClassDef)]
