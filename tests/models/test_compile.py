"""Compiled networks: computed as they are written, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.step import parts_of, start
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP
from fewstep.models.compile import compile_network
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from tests import tiny
from tests.models.test_memory import LABELS, T, denoiser, x
from tests.training.runs import METHODS, begin, config, go, weights

NOT_A_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""What torch's compiler says of its own look at a tensor."""


@pytest.mark.parametrize("mode", ["whole", "graphs", "blocks", "none"])
def test_a_compiled_network_computes_the_same(mode, counter):
    made = denoiser("dit")
    names = list(made.network.state_dict())
    with torch.no_grad():
        plain = made(x(), T, LABELS).value
        compile_network(made, mode)
        assert torch.allclose(made(x(), T, LABELS).value, plain, atol=1e-6)
    assert (counter.runs > 0) == (mode != "none")
    assert list(made.network.state_dict()) == names


@NOT_A_LEAF
@pytest.mark.parametrize(
    "name", ["dmd2_gan", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "dmd2_gan")]
)
def test_a_run_goes_the_same_way(name, tmp_path, counter):
    """Six steps of every method, whole networks compiled."""
    ends = []
    for mode in ("none", "whole"):
        state = begin(config(METHODS[name], tmp_path / mode, train={"compile": mode}))
        go(state, 6)
        ends.append(weights(state))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
@NOT_A_LEAF
@pytest.mark.parametrize("name", ["adversarial", "gdd", "agd", "plug_and_play", "scm", "flow_map"])
def test_networks_that_are_alike_keep_their_taps_and_additions(name, tmp_path, counter):
    """Student, critic and teacher are of one class, whose code they share; one has a tap, or is added to."""
    losses = []
    for mode in ("none", "whole"):
        state = start(name, "dit", True, tmp_path / mode)
        parts = {id(part.network): part for part in parts_of(state) if isinstance(part, NetworkDenoiser)}
        for part in parts.values():
            tiny.alive(part.network, 0.1)
            compile_network(part, mode)
        losses.append([{k: float(v) for k, v in report.terms.losses.items()} for report in go(state, 4)])
    assert counter.runs > 0
    for one, other in zip(*losses, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@NOT_A_LEAF
def test_every_block_of_a_unet_stays_compiled(counter):
    """Of four widths, in each kind of pass, at two batch sizes: more versions of a class than torch keeps by itself."""
    network = UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16, 24, 32), layers_per_block=1,
                                   cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4)  # fmt: skip
    made = make_denoiser(network, Schedule(VP(alphas_cumprod({"beta_start": 1e-4})), Kind.EPS))
    compile_network(made, "blocks")
    for training in (False, True):
        network.requires_grad_(training)
        for batch in (2, 4):
            counter.runs = 0
            text = Condition({"encoder_hidden_states": torch.ones(batch, 3, 8)})
            with torch.set_grad_enabled(training):
                made(torch.ones(batch, 4, 16, 16), torch.full((batch,), 9.0), text)
            assert counter.runs == 8


def test_what_a_recorded_graph_put_out_is_not_overwritten(monkeypatch):
    """By a compiler whose code writes to the same memory each time, as a recorded graph does."""
    held: list[Tensor] = []

    def record(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        def run(*arguments: Tensor):
            out = graph.forward(*arguments)
            held.append(out[0].clone()) if not held else held[0].copy_(out[0])
            return (held[0], *out[1:])

        return run

    asked, plain = [], torch.compile

    def compiled(call: Callable[..., Any], mode: str | None = None, **words: Any) -> Any:
        asked.append(mode)
        return plain(call, backend=record, **words)

    monkeypatch.setattr(torch, "compile", compiled)
    made = denoiser("dit")
    with torch.no_grad():
        plain_values = [made(at, T, LABELS).value for at in (x(), 2 * x())]
        compile_network(made, "graphs")
        values = [made(at, T, LABELS).value for at in (x(), 2 * x())]
    torch._dynamo.reset()
    assert asked == ["reduce-overhead", None]  # the network, and its derivative
    for value, expected in zip(values, plain_values, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dmd2", "consistency", "scm"])
def test_a_run_of_recorded_graphs_goes_the_same_way(name, tmp_path):
    """Twelve steps on CUDA with and without graphs, samples of the average in between; memory does not grow."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from fewstep.training.assemble import assemble
    from fewstep.training.opening import Sources
    from tests.training.runs import sources, vector_denoiser

    ends, memory = [], []
    for mode in ("none", "graphs"):
        AcceleratorState._reset_state(True)
        given = sources()
        start = Sources(given.dataset, given.teacher, vector_denoiser().to("cuda"))
        state = assemble(config(METHODS[name], tmp_path, train={"steps": 12, "compile": mode}), start, Accelerator())
        for _ in range(4):
            go(state, 3)
            batch = state.next_batch()
            with torch.no_grad(), state.method.averages["ema"].swapped():
                state.method.student(batch.x, torch.full((len(batch.x),), 0.5, device="cuda"), batch.condition)
            memory.append(torch.cuda.memory_allocated())
        ends.append(weights(state))
        torch._dynamo.reset()
    AcceleratorState._reset_state(True)
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-3)
    assert memory[-1] <= 1.1 * memory[-2]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["whole", "blocks", "graphs"])
def test_cuda_computes_the_same_compiled(mode):
    made, noisy = denoiser("unet").to("cuda"), x().cuda()
    time, labels = T.cuda(), LABELS.to("cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        plain = made(noisy, time, labels).value.float()
        compile_network(made, mode)
        values = [made(noisy, time, labels).value.float() for _ in range(4)]  # the first compile, warm up and record
    torch._dynamo.reset()
    assert float((values[-1] - plain).norm() / plain.norm()) < 0.02
