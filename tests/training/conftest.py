"""What tests of training are given."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.disks import mount


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount(place, "-t", "tmpfs", "-o", "size=512k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
