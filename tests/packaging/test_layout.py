"""What ships, and under which name."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.packaging.source import ROOT, WINGS, folders, pyproject, sources


def test_the_list_of_packages_is_the_folders():
    declared = pyproject()["tool"]["setuptools"]["packages"]
    found = [source.name for source in sources() if source.path.name == "__init__.py"]
    assert sorted(declared) == sorted(found)


def test_no_python_file_sits_outside_a_package():
    homes = {source.path.parent for source in sources() if source.path.name == "__init__.py"}
    assert [source.place for source in sources() if source.path.parent not in homes] == []


def test_the_map_sends_each_name_to_its_folder():
    declared = pyproject()["tool"]["setuptools"]["package-dir"]
    assert declared == {name: folder.relative_to(ROOT).as_posix() for name, folder in folders().items()}


@pytest.mark.parametrize("wing", WINGS)
def test_the_hall_links_to_each_wing(wing):
    assert os.readlink(ROOT / "fewstep" / wing) == f"../{wing}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("wing", WINGS)
def test_git_keeps_the_link_a_link(wing):
    listed = subprocess.run(
        ["git", "ls-files", "--stage", f"fewstep/{wing}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.startswith("120000 "), "a link that git stores as a file is broken for everyone else"


def test_entry_points_lead_into_the_wing_of_methods():
    project = pyproject()["project"]
    assert project["scripts"] == {"fewstep": "fewstep.cli:main"}
    assert {target.split(".")[1] for target in project["entry-points"]["fewstep.methods"].values()} == {"methods"}
