"""The main job needs no network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fewstep.errors import UserError

CUT_OFF = """
import socket, sys
asked = []
def refuse(*words, **_):
    asked.append(repr(words)[:80])
    raise OSError("no network in this test")
class Local(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX:
            refuse(address)
        return super().connect(address)
    connect_ex = sendto = connect
socket.socket, socket.create_connection = Local, refuse
socket.getaddrinfo = socket.gethostbyname = refuse
from fewstep.cli import main
try:
    main(sys.argv[1:])
finally:
    print("asked:", asked)
"""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way out raises, and is written down."""
    asked: list[str] = []

    def refuse(*words: object, **_: object) -> None:
        asked.append(repr(words))
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


def test_samples_and_training_ask_no_network(tmp_path, no_network):
    from fewstep.cli import app

    app(["sample", "emoji32", "--out", str(tmp_path / "samples.png"), "--steps", "1"], standalone_mode=False)
    assert (tmp_path / "samples.png").stat().st_size > 0
    path = tmp_path / "run.yaml"
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"path": "emoji32"},
        "method": {"name": "consistency", "solver": "ddim", "intervals": 10},
        "data": {"name": "emoji32", "batch_size": 2},
        "train": {"steps": 2, "sample_every": 0, "trackers": []},
        "health": {"every": 0},
    }
    path.write_text(yaml.safe_dump(values))
    app(["train", str(path)], standalone_mode=False)
    assert (tmp_path / "run" / "checkpoints" / "latest" / "state.json").is_file()
    assert no_network == []


def test_the_net_would_have_been_seen(tmp_path, no_network, monkeypatch):
    from fewstep.models.load import load_denoiser

    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 80))
    assert no_network == ["(('localhost', 80),)"]
    with pytest.raises(UserError, match=r"teacher.path: 'someone/something' is no folder, and the hub did not give it"):
        load_denoiser("someone/something")


@pytest.mark.slow
def test_the_demo_asks_no_network(tmp_path):
    words = [sys.executable, "-c", CUT_OFF, "demo", "--quick", "--out", str(tmp_path / "demo")]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "asked: []"
    assert any(Path(tmp_path / "demo").rglob("*.safetensors"))
