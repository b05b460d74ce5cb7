"""What a turn does not use waits elsewhere, and the run is the same run to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training.loop import TrainState
from fewstep.training.offload import Offload, offload_to_host
from fewstep.training.sharding import denoisers
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, sources


@dataclass(frozen=True)
class Elsewhere:
    """A place beside the CPU: tensors that wait are in double precision, which no computation in single takes."""

    def holds(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.float64

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.dtype == torch.float32 else tensor

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.float()


def offloaded(state: TrainState) -> TrainState:
    networks = {id(one.network): one.network for one in denoisers(vars(state.method).values())}
    state.offload = Offload(state.method, state.optimizers, tuple(networks.values()), Elsewhere())
    return state


def waiting(state: TrainState) -> set[str]:
    """Players whose moments wait, and averages that do."""
    moments = {
        name
        for name, optimizer in state.optimizers.items()
        if any(s["exp_avg"].dtype == torch.float64 for s in optimizer.adamw.state.values())
    }
    averages = state.method.averages.items()
    return moments | {name for name, one in averages if any(t.dtype == torch.float64 for t in one.shadow.values())}


@pytest.mark.parametrize("name", ["dmd2_gan", "adversarial", "self_adversarial", "progressive", "scfm"])
def test_an_offloaded_run_is_the_same_run(name, tmp_path):
    run = config(METHODS[name], tmp_path, train={"steps": 14})
    plain, moved = begin(run, sources(True)), offloaded(begin(run, sources(True)))
    go(plain)
    go(moved)
    place = Elsewhere()
    for tensor in everything_there(moved):
        tensor.data = place.take(tensor.data) if place.holds(tensor) else tensor.data
    assert_same(everything(plain), everything(moved))


def everything_there(state: TrainState) -> list[Tensor]:
    found = [p for player in state.method.players.values() for p in player.parameters.values()]
    found += [t for average in state.method.averages.values() for t in average.shadow.values()]
    states = (s for optimizer in state.optimizers.values() for s in optimizer.adamw.state.values())
    return found + [value for one in states for value in one.values() if value.ndim]


def test_the_idle_players_wait(tmp_path):
    state = offloaded(begin(config(METHODS["dmd2"], tmp_path, train={"steps": 9}), sources(True)))
    seen = [(report.turn, waiting(state)) for report in steps(state)]
    assert (
        seen[3:]
        == [
            ("critic", {"student", "ema"}),
            ("critic", {"student", "ema"}),
            ("student", {"fake_score"}),
        ]
        * 2
    )


def test_a_network_waits_through_the_turns_that_do_not_call_it(tmp_path):
    state = offloaded(begin(config(METHODS["dmd2"], tmp_path, train={"steps": 9}), sources(True)))
    method: Any = state.method
    teacher = method.real_score.denoiser.network
    found = [(report.turn, next(teacher.parameters()).dtype) for report in steps(state)]
    assert found[1:] == [
        ("critic", torch.float64),
        ("student", torch.float32),
        *[("critic", torch.float64), ("critic", torch.float64), ("student", torch.float32)] * 2,
    ]


def steps(state: TrainState):
    """One report after the other, the run looked at in between."""
    for _ in range(state.config.train.steps):
        yield from go(state, 1)


def test_there_is_nowhere_to_go_from_the_cpu(tmp_path):
    with pytest.raises(UserError, match=r"memory.offload: true given, but this run computes in the host's memory"):
        begin(config(METHODS["dmd2"], tmp_path, memory={"offload": True}))


@pytest.mark.gpu
def test_offloading_on_cuda_is_the_same_run(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from fewstep.training.assemble import assemble

    AcceleratorState._reset_state(True)
    ends = []
    for offload in (False, True):
        start = sources(True)
        for one in (start.student, start.teacher):
            assert isinstance(one, NetworkDenoiser)
            one.network.to("cuda")
        run = config(METHODS["dmd2_gan"], tmp_path, train={"steps": 9}, memory={"offload": offload})
        state = assemble(run, start, Accelerator())
        go(state)
        ends.append({key: value.cpu() for key, value in everything(state).items()})
    AcceleratorState._reset_state(True)
    assert_same(*ends)


def test_the_host_is_another_place_than_the_device(tmp_path):
    state = begin(config(METHODS["dmd2"], tmp_path))
    with pytest.raises(UserError, match=r"memory.offload"):
        offload_to_host(state.method, state.optimizers, [], torch.device("cpu"))
