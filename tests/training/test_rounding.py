"""Weights in bfloat16: rounding without bias, runs that go where float32 ones go, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.config import Optim
from fewstep.models import players, stretches
from fewstep.models.players import Average, Player
from fewstep.models.shards import is_spread, local
from fewstep.rng import Rng
from fewstep.training import checkpoint, rounding
from fewstep.training.finished import load_run
from fewstep.training.loop import TrainState
from fewstep.training.optim import gradient_norm, make_optimizers
from fewstep.training.retention import list_checkpoints
from fewstep.training.rounding import round_stochastically
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, weights

NARROW = {"precision": "bf16_weights"}


@pytest.fixture(autouse=True)
def accelerate_anew():
    """accelerate keeps the first precision that a process asks for."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rounding_has_no_bias():
    """The mean of many draws lies within 4 standard errors, and every draw is one of the two neighbours."""
    exact = torch.tensor([1.001, -1.001, 3.14159265, 1e-20, -7e30, 0.9999, 2.0**-126 * 1.003])
    drawn = exact.expand(40_000, -1).contiguous().clone()
    round_stochastically(drawn, generator())
    below, above = drawn.min(0).values.double(), drawn.max(0).values.double()
    share = (exact.double() - below) / (above - below)
    assert torch.equal(drawn.bfloat16().float(), drawn)
    assert torch.all((drawn == below) | (drawn == above))
    found = (drawn == above).double().mean(0)
    assert torch.all((found - share).abs() < 4 * (share * (1 - share) / len(drawn)).sqrt())
    assert torch.all((above - below) <= 2**-7 * exact.abs())


def test_what_bfloat16_holds_stays_as_it_is():
    numbers = torch.randn(10_000, generator=generator()).bfloat16().float()
    numbers[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    after = numbers.clone()
    round_stochastically(after, generator())
    assert torch.equal(after.view(torch.int32), numbers.view(torch.int32))


def players_of(values: Tensor) -> tuple[Player, Player]:
    """The same weights in bfloat16 and in float32, one of them in channels-last layout."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        image = nn.Parameter(values.view(4, 5, 2, 5).to(dtype, memory_format=torch.channels_last, copy=True))
        flat = nn.Parameter(values.to(dtype, copy=True))
        made.append(Player({"image": image, "flat": flat, "norm": nn.Parameter(torch.ones(3))}))
    return made[0], made[1]


def test_a_step_is_torch_s_own_rounded_to_a_neighbour(monkeypatch):
    """Moments and weights after three clipped steps, in stretches of one tensor each; float32 parts to the bit."""
    monkeypatch.setattr(stretches.stretches, "__defaults__", (150,))
    values = torch.randn(200, generator=generator()).bfloat16()
    config = Optim(lr=1e-2, weight_decay=0.1)
    narrow, wide = players_of(values)
    mine = make_optimizers({"a": narrow}, config, Rng(0))["a"]
    other = make_optimizers({"a": wide}, config)["a"]
    for step in range(3):
        for name, p in wide.parameters.items():
            q, gradient = narrow.parameters[name], torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            p.grad = torch.empty_like(p).copy_(gradient.bfloat16())  # in the layout of its parameter, as autograd's
            q.grad = p.grad.to(q.dtype, copy=True)
        one, two = mine.step(1.0, 1.0), other.step(1.0, 1.0)
        torch.testing.assert_close(one, two)
    assert torch.equal(narrow.parameters["norm"], wide.parameters["norm"])
    for name in ("image", "flat"):
        leaf, state = narrow.parameters[name], mine.adamw.state[narrow.parameters[name]]
        exact = other.adamw.state[wide.parameters[name]]
        assert leaf.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert leaf.stride() == state["exp_avg"].stride() == wide.parameters[name].stride()
        assert float(state["step"]) == 3
        torch.testing.assert_close(leaf.float(), wide.parameters[name].detach(), rtol=2**-6, atol=2e-3)
        torch.testing.assert_close(state["exp_avg"].float(), exact["exp_avg"], rtol=2**-5, atol=1e-3)
        torch.testing.assert_close(state["exp_avg_sq"].float(), exact["exp_avg_sq"], rtol=2**-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_nothing():
    narrow, _ = players_of(torch.randn(200, generator=generator()).bfloat16())
    optimizer = make_optimizers({"a": narrow}, Optim(lr=1e-2), Rng(0))["a"]
    for bad in (False, True):
        for p in narrow.parameters.values():
            p.grad = torch.ones_like(p)
        if bad:
            narrow.parameters["flat"].grad = torch.full((200,), torch.nan, dtype=torch.bfloat16)
        before = [p.detach().clone() for p in narrow.parameters.values()]
        kept = [v.clone() for state in optimizer.adamw.state.values() for v in state.values()]
        optimizer.step(1.0, 1.0)
    assert all(torch.equal(p, was) for p, was in zip(narrow.parameters.values(), before, strict=True))
    now = [v for state in optimizer.adamw.state.values() for v in state.values()]
    assert all(torch.equal(v, was) for v, was in zip(now, kept, strict=True))
    assert int(optimizer.skips.total) == 1


def test_norms_of_gradients_are_summed_in_float32():
    parameters = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(9))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert float(gradient_norm(parameters, [])) == pytest.approx(4105**0.5, rel=1e-6)


def test_an_average_of_bfloat16_is_float32_and_made_in_stretches(monkeypatch):
    narrow, wide = players_of(torch.randn(200, generator=generator()).bfloat16())
    seen = []

    def counted(tensors: list[Tensor]) -> list[Tensor]:
        seen.append(sum(t.numel() for t in tensors))
        return stretches.in_float32(tensors)

    monkeypatch.setattr(stretches.stretches, "__defaults__", (150,))
    monkeypatch.setattr(players, "in_float32", counted)
    one, other = Average.of(narrow, 0.9), Average.of(wide, 0.9)
    for source in (narrow, wide):
        for p in source.parameters.values():
            p.data += 1.0
    one.update()
    other.update()
    assert seen == [200, 200, 3]
    for name, shadow in one.shadow.items():
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow, other.shadow[name], rtol=2**-8, atol=1e-3)


def share_of_the_way(run: dict[str, Tensor], start: dict[str, Tensor], end: dict[str, Tensor]) -> float:
    """How far the student's hidden layers went along the way that float32 weights took."""
    keys = [k for k in start if k.startswith("student/middle") and start[k].ndim > 1]
    along = sum(float(((run[k] - start[k]) * (end[k] - start[k])).sum()) for k in keys)
    return along / sum(float((end[k] - start[k]).square().sum()) for k in keys)


def test_small_updates_arrive_where_rounding_to_the_nearest_stalls(tmp_path, monkeypatch):
    """DMD2 on the mixture at a small rate: steps of 1e-4 on weights of about 0.3, whose bfloat16 spacing is 2e-3."""

    def ended(precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        AcceleratorState._reset_state(True)
        train = {"precision": precision, "steps": 60}
        state = begin(config(METHODS["dmd2"], tmp_path, train=train, optim={"lr": 1e-4}, data={"batch_size": 32}))
        before = {key: value.float() for key, value in weights(state).items()}
        go(state)
        return before, {key: value.float() for key, value in weights(state).items()}

    start, end = ended("bf16")
    _, arrived = ended("bf16_weights")
    monkeypatch.setattr(rounding, "round_stochastically", lambda numbers, _: numbers.copy_(numbers.bfloat16()))
    _, stalled = ended("bf16_weights")
    assert share_of_the_way(arrived, start, end) == pytest.approx(1.0, abs=0.1)
    assert share_of_the_way(stalled, start, end) < 0.25


@pytest.mark.parametrize("name", ["dmd2_gan", "consistency", "scm", "progressive"])
def test_stopped_and_resumed_is_bit_identical(tmp_path, name):
    run = config(METHODS[name], tmp_path, train=NARROW)
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, 4)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(list_checkpoints(tmp_path)[-1], second)
    assert_same(everything(first), everything(second))
    go(second)
    assert_same(everything(straight), everything(second))
    found = everything(second)
    assert {v.dtype for k, v in found.items() if k.startswith("average")} <= {torch.float32, torch.int64}
    assert found["student/last.weight"].dtype == found["student/last.weight/exp_avg_sq"].dtype == torch.bfloat16
    assert found["student/labels.weight"].dtype == torch.float32


@pytest.mark.slow
def test_a_checkpoint_keeps_the_precision_and_a_finished_run_is_float32(tmp_path):
    """What is sampled and exported is the average, which is not rounded."""
    from fewstep.commands.train import write_config
    from fewstep.config_file import load
    from fewstep.training.assemble import assemble, make_accelerator
    from fewstep.training.opening import open_sources

    words = [f"run.dir={tmp_path}", "train.precision=bf16_weights", "data.batch_size=2", "train.steps=2"]
    run = load(Path("configs/emoji32/consistency.yaml"), words)
    state = assemble(run, open_sources(run), make_accelerator(run))
    go(state)
    write_config(run)
    saved = checkpoint.save(tmp_path / "checkpoints", state)
    stored, average = (load_file(saved / f"{name}.safetensors") for name in ("player-student", "average-ema"))
    assert stored["conv_out.weight"].dtype == torch.bfloat16
    assert stored["conv_norm_out.weight"].dtype == stored["conv_in.weight"].dtype == torch.float32
    assert {value.dtype for value in average.values()} == {torch.float32}
    finished = dict(load_run(tmp_path).student.network.named_parameters())
    assert all(torch.equal(finished[key], value) for key, value in average.items())
    assert not torch.equal(average["conv_out.weight"], average["conv_out.weight"].bfloat16().float())


def two_ranks(folder: Path) -> None:
    """Each kind of sharding: straight, and stopped and gone on."""
    for shard in ("none", "full"):
        run = config(METHODS["dmd2"], folder / shard, train={**NARROW, "shard": shard})
        straight, cut, again = (begin_rank(run) for _ in range(3))
        go(straight)
        go(cut, 4)
        checkpoint.save(folder / shard, cut)
        checkpoint.restore(list_checkpoints(folder / shard)[-1], again)
        go(again)
        same(straight, again)
        own = [p for one in straight.method.players.values() for p in one.parameters.values()]
        assert {p.dtype for p in own} == {torch.bfloat16, torch.float32}
        assert {p.dtype for p in own if is_spread(p)} == ({torch.bfloat16} if shard == "full" else set())
        norms = torch.stack([p.detach().double().norm() for p in own if not is_spread(p)])
        there = [torch.zeros_like(norms) for _ in range(2)]
        torch.distributed.all_gather(there, norms)
        assert torch.equal(there[0], there[1]), "every process rounds what all have alike"


def same(one: TrainState, other: TrainState) -> None:
    ours, theirs = everything(one), everything(other)
    assert [k for k in ours if not torch.equal(local(ours[k]), local(theirs[k]))] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_round_alike_and_resume(tmp_path):
    assert launch(two_ranks, tmp_path) == [0, 0]


@pytest.mark.gpu
def test_a_run_on_cuda_goes_the_same_way_and_never_waits(tmp_path):
    """As on the CPU: the share of the way, under torch's alarm for reads by the host."""
    from accelerate import Accelerator

    from fewstep.data.mixture import MixtureSet
    from fewstep.diffusion.gaussian import five_modes
    from fewstep.diffusion.process import Flow
    from fewstep.training.assemble import assemble
    from fewstep.training.opening import Sources
    from tests.training.runs import vector_denoiser

    ends = []
    for precision in ("bf16", "bf16_weights"):
        AcceleratorState._reset_state(True)
        mixture = five_modes(labelled=True)
        start = Sources(MixtureSet(mixture), mixture.denoiser(Flow()), vector_denoiser().to("cuda"))
        train = {"precision": precision, "steps": 100}
        run = config(METHODS["dmd2"], tmp_path, train=train, optim={"lr": 1e-4}, data={"batch_size": 32})
        state = assemble(run, start, Accelerator(mixed_precision="bf16"))
        before = {key: value.float() for key, value in weights(state).items()}
        batches = [state.next_batch() for _ in range(100)]
        state._batches = iter(batches)
        go(state, 7)
        torch.cuda.set_sync_debug_mode("error")
        try:
            go(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append({key: value.float() for key, value in weights(state).items()})
    assert share_of_the_way(ends[1], before, ends[0]) == pytest.approx(1.0, abs=0.1)
