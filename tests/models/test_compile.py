"""Compiled networks: in place, and never given up on because of a forward derivative."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.derivative import along, forward_derivative
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP
from fewstep.models.compile import compile_network
from fewstep.models.conditioning import Condition
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
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
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode=None: plain(module, backend=found))
    yield found
    torch._dynamo.reset()


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


@pytest.mark.parametrize("mode", ["whole", "graphs", "blocks"])
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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

    asked, plain = [], nn.Module.compile

    def compiled(module: nn.Module, mode: str | None = None) -> None:
        asked.append(mode)
        plain(module, backend=record)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    made = denoiser("dit")
    with torch.no_grad():
        plain_values = [made(at, T, LABELS).value for at in (x(), 2 * x())]
        compile_network(made, "graphs")
        values = [made(at, T, LABELS).value for at in (x(), 2 * x())]
    torch._dynamo.reset()
    assert asked == ["reduce-overhead"]
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
    from tests.training.runs import METHODS, config, go, sources, vector_denoiser, weights

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
