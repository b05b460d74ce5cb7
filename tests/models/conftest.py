"""A compiler for tests of compiled networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


class Counter:
    """A compiler that leaves graphs as they are, and counts them, and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        self.graphs += 1

        def run(*arguments: Tensor):
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counter(monkeypatch):
    found, plain = Counter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode=None, **words: plain(call, backend=found, **words))
    yield found
    torch._dynamo.reset()
