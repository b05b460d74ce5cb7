"""The repository as text: its files, its packages and what they import, without running any of it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("methods", "pipelines", "evaluation", "configs")


@dataclass(frozen=True)
class Import:
    """One import statement's reach: the absolute name of what it names, and how many dots it was written with."""

    name: str
    dots: int
    line: int


@dataclass(frozen=True)
class Source:
    """One Python file of the package: its import name, its place and its text."""

    name: str
    path: Path

    @property
    def wing(self) -> str | None:
        """The wing the file belongs to; None in the hall."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in WINGS else None

    @property
    def place(self) -> str:
        """The path from the repository's root, as messages show it."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        """The file's text."""
        return self.path.read_text(encoding="utf-8")

    @property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.text, filename=str(self.path))

    @property
    def package(self) -> str:
        """The package that relative imports of this file start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def imports(self) -> Iterator[Import]:
        """Every import in the file, those inside functions too; `from a import b` reaches both `a` and `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, 0, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield Import(base, node.level, node.lineno)
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.level, node.lineno)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        kept = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
        return ".".join([*kept, node.module] if node.module else kept)


def folders() -> dict[str, Path]:
    """The package's rooms at the root: `fewstep` and its four wings, by import name."""
    return {"fewstep": ROOT / "fewstep"} | {f"fewstep.{wing}": ROOT / wing for wing in WINGS}


def python_files(name: str, folder: Path) -> Iterator[Source]:
    """The Python files below a folder as modules below `name`; links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from python_files(f"{name}.{path.name}", path)
        elif path.name == "__init__.py":
            yield Source(name, path)
        elif path.suffix == ".py":
            yield Source(f"{name}.{path.stem}", path)


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file that ships."""
    return tuple(source for name, folder in folders().items() for source in python_files(name, folder))


@cache
def pyproject() -> dict:
    """The parsed `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def registered() -> dict[str, str]:
    """The built-in methods as declared: name to the module that holds the class."""
    declared = pyproject()["project"]["entry-points"]["fewstep.methods"]
    return {name: target.partition(":")[0] for name, target in declared.items()}
