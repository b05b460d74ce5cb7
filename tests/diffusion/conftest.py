"""Processes that every test of the theory runs on."""

import pytest
import torch

from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow


def stable_diffusion_table() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, 0)


@pytest.fixture
def vp() -> VP:
    return VP(stable_diffusion_table())


@pytest.fixture(params=["vp", "edm", "flow", "trig"])
def process(request: pytest.FixtureRequest) -> Process:
    made = {"vp": lambda: VP(stable_diffusion_table()), "edm": EDM, "flow": Flow, "trig": lambda: TrigFlow(0.5)}
    return made[request.param]()


@pytest.fixture
def inner_times(process: Process) -> torch.Tensor:
    """Seven float64 times strictly inside the process's range, no whole VP index among them."""
    fractions = torch.tensor([0.0305, 0.1, 0.2503, 0.5, 0.7017, 0.9, 0.98], dtype=torch.float64)
    return process.at(fractions) + (0.25 if isinstance(process, VP) else 0.0)
