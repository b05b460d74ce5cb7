"""`fewstep --help` answers at once: it must not load torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "PIL", "scipy")
CODE = f"""
import json, sys
from fewstep.cli import main
sys.argv = ["fewstep", *sys.argv[1:]]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("configs",)], ids=" ".join)
def test_help_loads_nothing_heavy(words):
    done = run(*words)
    assert done.stdout.strip()
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_help_takes_under_half_a_second():
    # The child's processor time: on a machine that does nothing else it is the time one waits, and a busy one,
    # where the tests run side by side, does not change it.
    def seconds() -> float:
        before = os.times()
        run("--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5
