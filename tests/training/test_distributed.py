"""Two processes are one with the same global batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.training.assemble import assemble
from fewstep.training.optim import average_gradients
from tests.training.runs import METHODS, begin, config, go, sources, weights

# Of the others, a relativistic loss does not see the last bias of a discriminator, whose rounding errors Adam takes for
# gradients; and agd's processes take whole trajectories of their own share of the batch.
ALIKE = tuple(name for name in METHODS if name not in {"gdd", "self_adversarial", "agd"})


def alone_in(rank: int, run, steps: int) -> dict[str, torch.Tensor]:
    """What rank `rank` of two ends with: everything of accelerate that training asks for, without its start-up."""
    plain = begin(run).accelerator
    two = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"), autocast=plain.autocast)
    state = assemble(run, sources(), two)  # pyright: ignore[reportArgumentType]
    go(state, steps)
    return weights(state)


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 2), float(rank)).t()
    parameters[1].grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert parameters[1].grad.tolist() == [1.5, 3.0, 4.5]
    assert parameters[2].grad is None
    for name in ALIKE:
        run = config(METHODS[name], Path(folder) / str(rank))
        save_file(alone_in(rank, run, 7), Path(folder) / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    """Forked, not spawned: torch is imported already, and this process has no thread of its own to lose."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(240)
    assert [one.exitcode for one in ranks] == [0, 0]
    for name in ALIKE:
        state = begin(config(METHODS[name], tmp_path))
        start = weights(state)
        go(state, 7)
        expected = weights(state)
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        for key, value in expected.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5)
        moved = max(float((value - start[key]).abs().max()) for key, value in expected.items())
        assert moved > 0.01, "agreement means nothing where nothing moved"
