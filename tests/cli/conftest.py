from __future__ import annotations

import pytest

from tests.cli.lab import Lab, train_once, write_images, write_teacher


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A teacher, images and a run of two steps that nobody changes."""
    root = tmp_path_factory.mktemp("shared")
    teacher, images = write_teacher(root / "teacher"), write_images(root / "images")
    return teacher, images, train_once(root, teacher, images)


@pytest.fixture
def lab(tmp_path, shared):
    return Lab(tmp_path, *shared)
