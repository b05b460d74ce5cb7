"""Forward derivatives of compiled networks: code of their own, and the numbers of the networks as they are written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.derivative import along, forward_derivative
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.compile import compile_network
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.load import make_denoiser
from fewstep.models.norms import arithmetic_layer_norm
from fewstep.models.schedule import Schedule
from tests import tiny
from tests.models import test_families
from tests.models.test_memory import LABELS, T, denoiser, x

case = test_families.case


@pytest.mark.parametrize(
    "mode", ["whole", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("graphs", "blocks"))]
)
def test_a_forward_derivative_has_code_of_its_own(mode, counter):
    """Made once, whatever it is asked for next, and beside the network's own code, which stays."""
    made = denoiser("dit")

    def slope(noisy: Tensor) -> Tensor:
        return along(lambda at: made(at, T, LABELS).velocity, (noisy,), (noisy.cos(),)).slope

    expected = slope(x())
    compile_network(made, mode)
    with torch.no_grad():
        first = made(x(), T, LABELS).value
        once, graphs = counter.runs, counter.graphs
        torch.testing.assert_close(slope(x()), expected, rtol=0, atol=1e-5)
        assert counter.runs == 2 * once
        assert counter.graphs == 2 * graphs
        slope(2 * x())
        assert torch.equal(made(x(), T, LABELS).value, first)
    assert counter.runs == 4 * once
    assert counter.graphs == 2 * graphs


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("build", [tiny.dit, tiny.unet2d])
def test_a_slope_is_trained_through_its_compiled_code(build, lora, counter):
    """Along the length of a jump, of which the network's arguments do not tell; with respect to every weight."""
    made = make_denoiser(tiny.alive(build()), Schedule(Flow(), Kind.VELOCITY))
    student = (made.lora_view("student", 2) if lora else made).with_scalar(SPAN)
    tiny.alive(nn.ParameterList(student.parameters().values()), 0.3 if lora else 0.05)
    for parameter in student.parameters().values():
        parameter.requires_grad_(True)
    words = tiny.inputs(made.network)
    noisy, told = words.pop(made.family.sample), Condition({k: v for k, v in words.items() if k != "timestep"})

    def gradient() -> Tensor:
        def says(span: Tensor) -> Tensor:
            return student(noisy, span, told.with_scalar(SPAN, span)).velocity

        with arithmetic_layer_norm():
            slope = forward_derivative(says, (0.3 * torch.ones(2),), (torch.ones(2),)).slope
        found = torch.autograd.grad(slope.square().mean(), [*student.parameters().values()], allow_unused=True)
        return torch.cat([one.flatten() for one in found if one is not None])

    expected = gradient()
    compile_network(student, "whole")
    found = gradient()
    assert counter.runs == 1
    assert float(expected.norm()) > 1e-4
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize("name", test_families.NAMES)
def test_every_family_has_compiled_derivatives(name, case, counter, caplog):
    """By blocks, and as one but for Lumina2, whose code looks into the mask of its text."""
    one = case(name)
    direction = (torch.randn(one.x.shape, generator=torch.Generator().manual_seed(5)), torch.ones_like(one.t))

    def slope() -> Tensor:
        return along(lambda x, t: one.denoiser(x, t, one.condition).value, (one.x, one.t), direction).slope

    expected = slope()
    for mode in ("blocks", "whole"):
        counter.runs = 0
        compile_network(one.denoiser, mode)
        found = slope()
        assert (counter.runs > 0, bool(said(caplog))) == (
            (False, True) if (name, mode) == ("lumina2", "whole") else (True, False)
        )
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        for module in one.denoiser.network.modules():
            module._compiled_call_impl = None


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "fewstep.models"]


def test_what_cannot_be_compiled_is_said_once_and_runs_as_it_is(counter, caplog):
    made, noisy = denoiser("dit"), x()

    def slope() -> Tensor:
        return along(lambda at: made(at, T, LABELS).velocity, (noisy,), (noisy.cos(),)).slope

    expected = slope()
    made.network.get_submodule("proj_out_1").register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compile_network(made, "whole")
    for _ in range(2):
        torch.testing.assert_close(slope(), expected, rtol=0, atol=0)
    (line,) = said(caplog)
    assert line.startswith("warning: DiTTransformer2DModel: its forward derivative is not compiled: ")
    assert counter.runs == 0


@pytest.mark.slow
def test_more_versions_than_torch_keeps_run_as_they_are(counter, caplog):
    made = denoiser("dit")
    compile_network(made, "whole")

    def slope(batch: int) -> Tensor:
        noisy, labels = x()[:batch], LABELS.rows(slice(0, batch))
        return along(lambda at: made(at, T[:batch], labels).velocity, (noisy,), (noisy.cos(),)).slope

    with torch._dynamo.config.patch(recompile_limit=1):
        both = slope(2)
        assert said(caplog) == []
        torch.testing.assert_close(slope(1), both[:1], rtol=0, atol=1e-5)
    assert len(said(caplog)) == 1
    assert counter.runs == 1


def test_a_derivative_inside_another_runs_as_it_is(counter):
    made, noisy = denoiser("dit"), x()

    def gradient() -> Tensor:
        def change(at: Tensor) -> Tensor:
            return forward_derivative(lambda y: made(y, T, LABELS).velocity, (at,), (noisy.cos(),)).slope.square().sum()

        return torch.func.grad(change)(noisy)

    expected = gradient()
    compile_network(made, "whole")
    assert torch.equal(gradient(), expected)
    assert counter.runs == 0


def test_what_does_not_move_has_no_slope(counter):
    """Blocks of a part of the network that the derivative does not reach."""
    made, noisy = denoiser("dit"), x()
    compile_network(made, "blocks")
    found = along(lambda scale: scale * made(noisy, T, LABELS).velocity, (torch.tensor(2.0),), (torch.tensor(3.0),))
    torch.testing.assert_close(2 * found.slope, 3 * found.value)
