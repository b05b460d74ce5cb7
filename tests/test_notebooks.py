"""The notebooks: kept without outputs, linked to each other, and run to their ends on what the demo makes."""

from __future__ import annotations

import ast
import json
import os
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 90  # seconds on two idle cores; here, where other tests run beside it, processor time stands for them


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


def test_there_are_four():
    names = ["01_inspect_samples", "02_anatomy_of_a_step", "03_compare_methods", "04_use_in_diffusers"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_stay_out_of_git(path):
    kept = [cell for cell in cells(path) if cell.get("outputs") or cell.get("execution_count") is not None]
    assert kept == [], f"strip {path.name} before it is committed: make notebooks shows outputs elsewhere"
    assert all(cell["metadata"] == {} for cell in cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_parses_and_links_lead_somewhere(path):
    for text in code(path):
        ast.parse(text)
    words = "".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+\.ipynb)\)", words)
    assert [link for link in links if not (path.parent / link).is_file()] == []
    assert len(links) == (0 if path == NOTEBOOKS[-1] else 1)


def test_a_student_is_used_in_diffusers_without_fewstep():
    importing = [text for text in code(NOTEBOOKS[3]) if re.search(r"^(from|import) fewstep", text, re.MULTILINE)]
    assert len(importing) == 1


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """`FEWSTEP_DEMO`, or a quick demo made here."""
    given = os.environ.get("FEWSTEP_DEMO")
    if given:
        return Path(given).resolve()
    from fewstep.commands.demo import run

    run(tmp_path_factory.mktemp("demo"), seed=0, quick=True)
    return tmp_path_factory.getbasetemp() / "demo0"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # Jupyter's own
def test_a_notebook_runs_to_its_end(path, demo, monkeypatch, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
    client = pytest.importorskip("nbclient", reason="the notebooks extra is not installed")
    monkeypatch.setenv("FEWSTEP_DEMO", str(demo))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    before, clock = os.times(), time.perf_counter()
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    after = os.times()
    took = after.children_user + after.children_system - before.children_user - before.children_system
    assert took < LIMIT, f"{took:.0f} s of processor time, {time.perf_counter() - clock:.0f} s by the clock"
    assert path == NOTEBOOKS[3] or any("image/png" in data for data in shown(notebook))


def shown(notebook) -> list[dict]:
    return [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
