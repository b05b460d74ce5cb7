"""Memory that is freed stays with the process, so that the next step finds its pages ready."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy
from fewstep.training.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    held = [numpy.ones(2**20) for _ in range(8)]  # 64 MiB, given back at the end

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_later_steps_find_their_memory_ready():
    def faults(word: str) -> int:
        run = subprocess.run([sys.executable, "-c", STEPS, word], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("plain") > 1000  # huge pages or not, they are asked for again
    assert faults("keep") < 100
