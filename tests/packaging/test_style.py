"""House rules that a formatter cannot see."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.packaging.source import Source, registered, sources

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HOT = ("fewstep.methods.", "fewstep.losses.", "fewstep.diffusion.")
METHOD_LINES = 150


def branches_on_a_name(tree: ast.AST, names: set[str]) -> Iterator[int]:
    """Lines that compare something called `method` or `name` with the name of a registered method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(called_a_name(side) for side in sides) and any(constants(side) & names for side in sides):
                yield node.lineno
        elif (
            isinstance(node, ast.Match)
            and called_a_name(node.subject)
            and any(constants(case.pattern) & names for case in node.cases)
        ):
            yield node.lineno


def called_a_name(node: ast.expr) -> bool:
    called = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return called in {"method", "name", "method_name"}


def constants(node: ast.AST) -> set[str]:
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def calls(tree: ast.AST, attribute: str) -> list[int]:
    """Lines that call `something.attribute(...)`."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
    ]


def unpickling(source: Source) -> list[str]:
    """Ways in which the file could run code out of a data file: an unpickler, or an unrestricted torch.load."""
    found = [one.name for one in source.imports() if one.name.split(".")[0] in UNPICKLERS]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [] if words.get("weights_only") == "True" else ["torch.load"]
    return found


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.place)
def test_nothing_branches_on_the_name_of_a_method(source):
    assert list(branches_on_a_name(source.tree, set(registered()))) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("if method == 'dmd2': pass", 1),
        ("if config.method.name in ('dmd2', 'x'): pass", 1),
        ("match method:\n    case 'dmd2': pass", 1),
        ("if name == 'emoji': pass", 0),
        ("names['dmd2'] = method", 0),
    ],
)
def test_the_search_for_branches_sees_them(text, lines):
    assert len(list(branches_on_a_name(ast.parse(text), {"dmd2"}))) == lines


def test_a_method_fits_on_a_few_screens():
    modules = set(registered().values())
    sizes = {source.place: len(source.text.splitlines()) for source in sources() if source.name in modules}
    assert {place: size for place, size in sizes.items() if size >= METHOD_LINES} == {}
    assert len(sizes) == len(modules)


def test_no_file_is_called_utils():
    assert [source.place for source in sources() if source.path.stem in {"utils", "util", "helpers", "misc"}] == []


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.place)
def test_nothing_is_unpickled(source):
    assert unpickling(source) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from joblib import load", ["joblib", "joblib.load"]),
        ("state = torch.load(path)", ["torch.load"]),
        ("state = torch.load(path, weights_only=False)", ["torch.load"]),
        ("state = torch.load(path, weights_only=True)", []),
    ],
)
def test_the_search_for_unpickling_sees_it(tmp_path, text, found):
    path = tmp_path / "made.py"
    path.write_text(text)
    assert unpickling(Source("fewstep.made", path)) == found


@pytest.mark.parametrize(
    "source", [one for one in sources() if one.name.startswith(HOT)], ids=lambda source: source.place
)
def test_the_hot_path_never_waits_for_the_device(source):
    assert calls(source.tree, "item") == []


def test_the_search_for_item_sees_it():
    assert calls(ast.parse("loss = terms.total\nlog(loss.item())"), "item") == [2]
