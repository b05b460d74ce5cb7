from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.commands import cache as command
from fewstep.commands.cache import Request
from tests.data.cache_lab import pictures, teacher
from tests.data.fake_encoder import FakeEncoder


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    made = FakeEncoder()
    monkeypatch.setattr(command, "open_encoder", lambda *_, **__: made)
    return made


@pytest.fixture
def request_(tmp_path: Path, encoder: FakeEncoder) -> Request:
    """Seven pictures with four captions, in shards of three, two at a time."""
    return Request(str(teacher(tmp_path / "teacher")), tmp_path / "cache", "captions", pictures(tmp_path / "set"), 8,
                   (), None, 0, False, 2, 3, "float32")  # fmt: skip
