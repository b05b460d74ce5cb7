"""What is added to a frozen network: nothing before training, and then what scale, time and condition ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.adapter_guidance import guidance_adapters, with_adapters
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import with_guidance
from fewstep.models.guide_network import guide_for, guide_of, with_guide
from fewstep.models.injection import Injection, blocks_of
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from tests import tiny
from tests.training.runs import vector_denoiser

SCALES = (1.0, 5.0)
T = torch.tensor([0.25, 0.8])


def network_of(build: Callable[[], nn.Module]) -> NetworkDenoiser:
    return make_denoiser(tiny.alive(build(), 0.2), Schedule(Flow(), Kind.VELOCITY))


@dataclass(frozen=True)
class Case:
    """A network with two samples and their conditions."""

    denoiser: NetworkDenoiser
    x: Tensor
    condition: Condition

    def says(self, scale: float | None, t: Tensor = T) -> Tensor:
        condition = self.condition
        if scale is not None:
            condition = with_guidance(condition, torch.full((len(t),), scale), self.denoiser)
        with torch.no_grad():
            return self.denoiser(self.x, t, condition).value


def plain(kind: str) -> Case:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    labels = Condition.of_labels(torch.tensor([0, 3]))
    match kind:
        case "UNet2DModel":
            return Case(network_of(tiny.unet2d_classes), randn(3, 8, 8), labels)
        case "UNet2DConditionModel":
            return Case(network_of(tiny.unet_sd15), randn(4, 8, 8), Condition({"encoder_hidden_states": randn(5, 16)}))
        case "DiTTransformer2DModel":
            return Case(network_of(tiny.dit), randn(4, 8, 8), labels)
        case "SD3Transformer2DModel":
            text = {"encoder_hidden_states": randn(5, 24), "pooled_projections": randn(12)}
            return Case(network_of(tiny.sd3), randn(4, 8, 8), Condition(text))
    return Case(vector_denoiser(), randn(2), labels)


KINDS = ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "VectorNetwork"]


def one_of(case: Case) -> Batch:
    return Batch(case.x[:1], case.condition.rows(slice(0, 1)), torch.tensor([0]))


def with_addition(case: Case, addition: str) -> Case:
    example = one_of(case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if addition == "adapters":
            added = with_adapters(case.denoiser.copy(), SCALES, example, 4, 8)
        else:
            added = with_guide(case.denoiser.copy(), guide_for(case.denoiser, SCALES, example, 4, 8))
    return Case(added, case.x, case.condition)


def injection_of(case: Case, addition: str) -> Injection:
    return guidance_adapters(case.denoiser) if addition == "adapters" else guide_of(case.denoiser)


@pytest.mark.parametrize("addition", ["adapters", "guide"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_network_to_the_bit(kind, addition):
    before = plain(kind)
    after = with_addition(before, addition)
    assert type(after.denoiser.network).__name__ == kind
    for scale in (None, 1.0, 4.0):
        assert torch.equal(after.says(scale), before.says(None))
    assert after.denoiser.guidance_range == SCALES


@pytest.mark.parametrize("addition", ["adapters", "guide"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_addition_learns_and_all_of_it(kind, addition):
    """After a first step, which opens the zero layers, every parameter has a gradient, and no weight of the network."""
    case = with_addition(plain(kind), addition)
    injection = injection_of(case, addition)
    own = set(map(id, injection.parameters()))
    assert all(p.requires_grad == (id(p) in own) for p in case.denoiser.network.parameters())
    tiny.alive(injection, 0.1)
    condition = with_guidance(case.condition, torch.tensor([2.0, 4.0]), case.denoiser)
    case.denoiser(case.x, T, condition).value.square().mean().backward()
    assert [n for n, p in injection.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    assert all(p.grad is None for p in case.denoiser.network.parameters() if id(p) not in own)


@pytest.mark.parametrize("addition", ["adapters", "guide"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_it_hears_the_scale_and_only_where_one_is_told(kind, addition):
    before = plain(kind)
    case = with_addition(before, addition)
    tiny.alive(injection_of(case, addition), 0.3)
    far, near = (float((case.says(2.0) - case.says(other)).abs().max()) for other in (4.0, 2.001))
    assert far > 1e-3
    assert near < 0.05 * far, "neighbouring scales are neighbours"
    assert torch.equal(case.says(None), before.says(None)), "nothing is left over from the pass before"


@pytest.mark.parametrize("addition", ["adapters", "guide"])
def test_samples_do_not_see_each_other(addition):
    case = with_addition(plain("UNet2DModel"), addition)
    tiny.alive(injection_of(case, addition), 0.1)
    together = case.denoiser(case.x, T, with_guidance(case.condition, torch.tensor([1.5, 4.0]), case.denoiser)).value
    for i, scale in enumerate((1.5, 4.0)):
        row = slice(i, i + 1)
        condition = with_guidance(case.condition.rows(row), torch.tensor([scale]), case.denoiser)
        alone = case.denoiser(case.x[row], T[row], condition).value
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("addition", ["adapters", "guide"])
def test_a_copy_has_an_addition_of_its_own(addition):
    case = with_addition(plain("UNet2DModel"), addition)
    twin = Case(case.denoiser.copy(), case.x, case.condition)
    tiny.alive(injection_of(twin, addition), 0.1)
    assert float((twin.says(3.0) - case.says(3.0)).abs().max()) > 1e-3
    assert torch.equal(case.says(3.0), plain("UNet2DModel").says(None))


def test_the_same_guide_plugs_into_a_fine_tuned_network():
    """Trained on one, it adds the same features to the other, and each keeps its own weights."""
    first, tuned = plain("UNet2DModel"), plain("UNet2DModel")
    tiny.alive(tuned.denoiser.network, 0.02)
    guided = with_addition(first, "guide")
    guide = tiny.alive(guide_of(guided.denoiser), 0.1)
    plugged = Case(with_guide(tuned.denoiser.copy(), guide), tuned.x, tuned.condition)
    for mine, its in zip(guide.parameters(), guide_of(plugged.denoiser).parameters(), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(plugged.says(None), tuned.says(None))
    shift, wanted = plugged.says(3.0) - tuned.says(None), guided.says(3.0) - first.says(None)
    assert float(wanted.abs().max()) > 1e-2
    assert float((shift - wanted).norm() / wanted.norm()) < 0.3


def test_a_guide_adds_at_the_decoder_alone():
    denoiser = plain("UNet2DModel").denoiser
    assert {name.split(".")[0] for name in blocks_of(denoiser.network, "decoder")} == {"up_blocks"}
    assert {name.split(".")[0] for name in blocks_of(denoiser.network)} == {"down_blocks", "mid_block", "up_blocks"}
    assert blocks_of(tiny.dit(), "decoder") == ("transformer_blocks.1",)


@pytest.mark.parametrize(("addition", "percent"), [("adapters", 1.90), ("guide", 1.32)])
def test_its_share_of_the_embedded_teacher(addition, percent):
    """At the methods' default sizes; the papers' are about 2 % and 1 %."""
    teacher = load_denoiser("emoji32")
    count = sum(p.numel() for p in teacher.network.parameters())
    example = Batch(torch.zeros(1, 3, 32, 32), Condition.of_labels(torch.tensor([0])), torch.tensor([0]))
    if addition == "adapters":
        injection = guidance_adapters(with_adapters(teacher, SCALES, example, 16, 32))
    else:
        injection = guide_of(with_guide(teacher, guide_for(teacher, SCALES, example, 16, 32)))
    share = injection.share_of(teacher.network)
    assert share == pytest.approx(sum(p.numel() for p in injection.parameters()) / count)
    assert 100 * share == pytest.approx(percent, abs=0.01)


def test_what_cannot_be_added_to_is_refused():
    with pytest.raises(UserError, match=r"network 'Linear' is not known; known: UNet"):
        blocks_of(nn.Linear(2, 2))
    case = plain("UNet2DModel")
    shared = case.denoiser.lora_view("student", 2)
    with pytest.raises(UserError, match=r"student.lora: the method brings adapters of its own"):
        with_adapters(shared, SCALES, one_of(case), 4, 8)
