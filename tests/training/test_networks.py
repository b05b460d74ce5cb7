"""Which settings reach which network, and what does not go together."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from benchmarks.step import start
from fewstep.commands import train as command
from fewstep.config import Memory, Optim, RunConfig, Train
from fewstep.errors import UserError
from fewstep.models.players import Player
from fewstep.models.recompute import Recompute
from fewstep.training import eight_bits
from fewstep.training.assemble import assemble
from fewstep.training.networks import named_networks, prepare_networks
from fewstep.training.optim import make_optimizers
from fewstep.training.sharding import denoisers
from tests.training.runs import METHODS, begin, config, go, sources, vector_denoiser, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """DMD2 on tiny UNets, with a discriminator on the fake score."""
    return start("dmd2", "unet", True, tmp_path_factory.mktemp("run"))


def prepare(state, train=None, memory=None, method=None):
    updates = {"train": train or Train(), "memory": memory or Memory(), "method": method or state.config.method}
    run = state.config.model_copy(update=updates)
    held = list(denoisers(vars(state.method).values()))
    prepare_networks(run, state.method.players, held, CPU)


def test_networks_are_known_by_who_trains_them(state):
    named = named_networks(state.method.players, denoisers(vars(state.method).values()))
    assert list(named) == ["student", "teacher", "fake_score"]
    assert named["student"][0].network is state.method.student.network
    assert named["teacher"][0].network is state.method.real_score.denoiser.network


def test_a_copied_backbone_is_its_player_s(tmp_path):
    method: Any = begin(config(METHODS["adversarial"], tmp_path), sources(True)).method
    named = named_networks(method.players, denoisers(vars(method).values()))
    assert {"student", "backbone"} <= set(named)
    assert named["backbone"][0].network is method.judge.backbone.network
    assert named["backbone"][0].network is not named["student"][0].network


def test_players_of_one_network_share_what_is_done_to_it(tmp_path):
    base = vector_denoiser()
    views = {name: base.lora_view(name, 2) for name in ("student", "fake_score")}
    players = {name: Player(view.parameters()) for name, view in views.items()}
    named = named_networks(players, [base, *views.values()])
    assert {name: [id(one.network) for one in group] for name, group in named.items()} == {
        "student": [id(base.network)],
        "fake_score": [id(base.network)],
    }
    run = config(METHODS["dmd2"], train={"compile_players": {"student": "whole"}})
    with pytest.raises(UserError, match=r"train.compile_players: none and whole given for players that share"):
        prepare_networks(run, players, [base, *views.values()], CPU)


def test_recomputation_reaches_the_players_that_are_named(state):
    prepare(state, memory=Memory(checkpoint=("student",)))

    def computes_again(network: torch.nn.Module) -> bool:
        return any(isinstance(getattr(m, "_gradient_checkpointing_func", None), Recompute) for m in network.modules())

    assert computes_again(state.method.student.network)
    assert not computes_again(state.method.fake_score.network)


@pytest.mark.parametrize(
    ("train", "memory", "line"),
    [
        (None, Memory(checkpoint=("studnet",)), r"memory.checkpoint: 'studnet' .*did you mean 'student'\?; there are"),
        (Train(compile_players={"fake": "whole"}), None, "train.compile_players: 'fake' has no network of its own"),
        (Train(compile="whole"), Memory(checkpoint=("student",)), "train.compile: whole given, with memory.checkpoint"),
        (Train(compile="blocks"), Memory(teacher="float8"), "memory.teacher: float8 given, with train.compile"),
    ],
)
def test_what_does_not_go_together_is_refused(state, train, memory, line):
    with pytest.raises(UserError, match=line):
        prepare(state, train, memory)


def test_a_kernel_without_a_forward_derivative_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"memory.attention: flash has no forward derivative; use method.derivative=central"
    ):
        begin(config(METHODS["scm"], tmp_path, memory={"attention": "flash"}))


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    player = {"student": Player({"w": torch.nn.Parameter(torch.zeros(2))})}
    with pytest.raises(
        UserError, match=r"optim.kind: adamw_8bit given, but bitsandbytes cannot be imported; pip install"
    ):
        make_optimizers(player, Optim(kind="adamw_8bit"))


def test_eight_bits_are_cuda_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.ModuleType("optim"))
    monkeypatch.setattr(eight_bits.importlib, "import_module", lambda name: types.ModuleType(name))
    player = {"student": Player({"w": torch.nn.Parameter(torch.zeros(2))})}
    with pytest.raises(UserError, match=r"optim.kind: paged_adamw_8bit given, but it runs on CUDA only"):
        make_optimizers(player, Optim(kind="paged_adamw_8bit"))


def test_an_optimizer_that_asks_the_host_goes_the_same_way(tmp_path, monkeypatch):
    """torch's own unfused AdamW in bitsandbytes' place; and a gradient that is not finite moves nothing there too."""
    run, eight = (config(METHODS["dmd2"], tmp_path, optim={"kind": kind}) for kind in ("adamw", "adamw_8bit"))

    def made(parameters, config, lr, weight_decay):
        return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay)

    monkeypatch.setattr("fewstep.training.optim.make_8bit", made)
    fused, other = begin(run), begin(eight)
    go(fused)
    go(other)
    for one, its in zip(weights(fused).values(), weights(other).values(), strict=True):
        torch.testing.assert_close(its, one, rtol=1e-5, atol=1e-7)
    before = weights(other)
    optimizer = other.optimizers["student"]
    for parameter in optimizer.player.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step(1.0, 1.0)
    assert all(torch.equal(value, before[key]) for key, value in weights(other).items())
    assert int(optimizer.skips.total) == 1


def test_grids_are_made_without_compiled_code(tmp_path, monkeypatch):
    """Another batch size would have networks compiled anew, and training would go on with that: to other bits."""
    seen: list[str] = []

    @contextmanager
    def noted(_run: RunConfig) -> Iterator[None]:
        seen.append("uncompiled")
        yield
        seen.append("as before")

    monkeypatch.setattr(command, "undisturbed", noted)
    monkeypatch.setattr(command, "sample_grid", lambda state, path: seen.append(path.name))
    run = config(METHODS["pretrain"], tmp_path, train={"steps": 1, "sample_every": 1, "trackers": []})
    assert len(list(command.logged(begin(run)))) == 1
    assert seen == ["uncompiled", "step-00000001.png", "as before"]


def test_a_run_that_computes_blocks_again_is_the_same_run(tmp_path):
    """DMD2 on tiny UNets, three steps, with and without."""
    from fewstep.training.assemble import assemble
    from fewstep.training.opening import Sources

    ends = []
    for names in ((), ("student", "fake_score")):
        torch.manual_seed(0)
        begun = start("dmd2", "unet", True, tmp_path)
        method: Any = begun.method
        run = begun.config.model_copy(
            update={
                "memory": Memory(checkpoint=names),
                "method": begun.config.method.model_copy(update={"critic_updates": 1}),
            }
        )
        found = Sources(begun.loader.dataset, method.real_score.denoiser, method.student)
        again = assemble(run, found, Accelerator(cpu=True))
        go(again, 3)
        ends.append(weights(again))
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"memory": {"teacher": "bfloat16"}}, "memory.teacher: bfloat16 given, but train.precision=bf16_weights keeps"),
        (
            {"optim": {"kind": "adamw_8bit"}},
            "train.precision: bf16_weights given, with optim.kind=adamw_8bit, which rounds to the nearest",
        ),
    ],
)
def test_weights_in_bfloat16_refuse_what_rounds_them_otherwise(sections, line):
    run = config(METHODS["dmd2"], train={"precision": "bf16_weights"}, **sections)
    with pytest.raises(UserError, match=line):
        assemble(run, sources(), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("train", "memory", "line"),
    [
        ({}, {}, "train.compile: graphs given, which CUDA alone records, and this run is on cpu"),
        ({"accumulate": 2}, {}, "train.compile: graphs given, with train.accumulate=2; use whole"),
        ({}, {"offload": True}, "train.compile: graphs given, with memory.offload, which moves weights; leave"),
        ({}, {"checkpoint": ["student"]}, "train.compile: graphs given, with memory.checkpoint; use blocks"),
        ({}, {"teacher": "float8"}, "memory.teacher: float8 given, with train.compile; leave one of them out"),
    ],
)
def test_graphs_are_refused_where_they_cannot_be_replayed(train, memory, line):
    for how in ({"compile": "graphs"}, {"compile_players": {"student": "graphs"}}):
        with pytest.raises(UserError, match=line):
            begin(config(METHODS["dmd2"], train={**how, **train}, memory=memory))


def test_an_average_is_never_kept_in_fewer_bits(tmp_path):
    """The target of consistency is a network that nobody trains, but no teacher: it moves by less than a bit."""
    state: Any = start("consistency", "unet", True, tmp_path)
    held = [*denoisers(vars(state.method).values())]
    averages, target = state.method.averages.values(), state.method.target.network
    for train, memory in ((Train(precision="bf16_weights"), Memory()), (Train(), Memory(teacher="bfloat16"))):
        run = state.config.model_copy(update={"train": train, "memory": memory})
        prepare_networks(run, state.method.players, held, CPU, averages)
        assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in state.method.student.network.parameters()}
    go(state, 2)


def test_image_networks_stay_channels_last_through_training(tmp_path):
    """Weights, gradients, moments and averages of every player, and the teacher: convolutions take them fastest so."""
    state: Any = start("dmd2", "unet", True, tmp_path)
    go(state, 6)
    networks = [state.method.student, state.method.fake_score, state.method.real_score.denoiser]
    kept = [p for one in networks for p in one.network.parameters()]
    for optimizer in state.optimizers.values():
        kept += [s[name] for s in optimizer.adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
    kept += [value for one in state.method.averages.values() for value in one.shadow.values()]
    images = [t for t in kept if t.ndim == 4 and t.shape[1] > 1 and t.shape[2] > 1]
    assert len(images) > 3 * 10
    assert all(t.is_contiguous(memory_format=torch.channels_last) and t.stride(1) == 1 for t in images)
