"""Compiled networks: in place, and never given up on because of a forward derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.derivative import along, forward_derivative
from fewstep.models.compile import compile_network
from tests.models.test_memory import LABELS, T, denoiser, x


class Counter:
    """A compiler that leaves graphs as they are, and counts how often they run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        def run(*arguments: Tensor):
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counter(monkeypatch):
    found, plain = Counter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend=found))
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["whole", "blocks", "none"])
def test_a_compiled_network_computes_the_same(mode, counter):
    made = denoiser("dit")
    names = list(made.network.state_dict())
    with torch.no_grad():
        plain = made(x(), T, LABELS).value
        compile_network(made, mode)
        assert torch.allclose(made(x(), T, LABELS).value, plain, atol=1e-6)
    assert (counter.runs > 0) == (mode != "none")
    assert list(made.network.state_dict()) == names


@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_forward_derivative_does_not_spoil_it(mode, counter):
    made, noisy = denoiser("dit"), x()

    def velocity(at: Tensor) -> Tensor:
        return made(at, T, LABELS).velocity

    expected = along(velocity, (noisy,), (torch.ones_like(noisy),)).slope
    compile_network(made, mode)
    with torch.no_grad():
        first = made(noisy, T, LABELS).value
        once = counter.runs
        assert once > 0
        slope = along(velocity, (noisy,), (torch.ones_like(noisy),)).slope
        forward_derivative(velocity, (noisy,), (torch.ones_like(noisy),))
        assert counter.runs == once, "a derivative runs the network as it is"
        assert torch.equal(made(noisy, T, LABELS).value, first)
    assert counter.runs == 2 * once
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6)
