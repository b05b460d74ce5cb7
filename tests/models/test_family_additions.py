"""What is added to networks of every family: a guidance scale as an input, with adapters too, and inside the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.errors import UserError
from fewstep.models.adapter_guidance import guidance_adapters, with_adapters
from fewstep.models.conditioning import NATIVE_GUIDANCE
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import GUIDANCE, with_guidance, with_guidance_input
from fewstep.models.guide_network import guide_for, guide_of, with_guide
from fewstep.models.injection import Injection
from tests import tiny
from tests.models import test_families
from tests.models.test_families import Case

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers

case = test_families.case
SCALES = (1.0, 5.0)
OWN = {"sd15", "sdxl", "playground", "flux"}
"""What gets the input of its class, which its stock pipelines feed; flux_guidance has it already."""
PICTURES = {"ddpm", "dit", "sd15", "sdxl", "playground", "pixart", "sd3", "sana"}
"""Whose blocks put out a grid of the picture's places."""
QUICK = {"flux", "flux_guidance", "zimage"}
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in dict.fromkeys(test_families.NAMES)]
TWO = torch.tensor([1.5, 4.0])


def says(one: Case, denoiser: NetworkDenoiser, scale: Tensor | None = None) -> Tensor:
    condition = one.condition if scale is None else with_guidance(one.condition, scale, denoiser)
    with torch.no_grad():
        return denoiser(one.x, one.t, condition).value


def heard(one: Case, denoiser: NetworkDenoiser) -> float:
    """How much other scales change."""
    return float((says(one, denoiser, TWO) - says(one, denoiser, TWO + 0.9)).abs().max())


def of_the_input(name: str) -> bool:
    return any(part in name for part in (".second.", ".cond_proj.", ".guidance_embedder."))


@pytest.mark.parametrize("name", NAMES)
def test_a_guidance_input_is_silent_until_trained(case: Callable[[str], Case], name: str):
    """And where stock pipelines would feed it, it is the class's own."""
    one = case(name)
    student = with_guidance_input(one.denoiser, SCALES)
    config: Any = student.network.config
    own = student.family.own_guidance(config)
    assert (GUIDANCE in student.graft.names) == (own is None) == (name not in OWN | {"flux_guidance"})
    if name == "flux_guidance":
        assert student.network is one.denoiser.network, "the student has weights of its own already"
        assert torch.equal(with_guidance(one.condition, TWO, student).batched[NATIVE_GUIDANCE], TWO)
        assert heard(one, student) > 1e-4
        return
    assert torch.equal(says(one, student, TWO), says(one, one.denoiser))
    added = {n: p.requires_grad_(True) for n, p in student.parameters().items() if of_the_input(n)}
    student(one.x, one.t, with_guidance(one.condition, TWO, student)).value.square().mean().backward()
    assert [n for n, p in added.items() if p.grad is not None and bool(p.grad.any())], "nothing would ever be learnt"
    tiny.alive(torch.nn.ParameterList(added.values()), 0.2)
    assert heard(one, student) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_s_view_has_an_input_that_no_other_view_hears(case: Callable[[str], Case], name: str):
    one = case(name)
    teacher = one.denoiser.copy()
    student = with_guidance_input(teacher.lora_view("student", 2), SCALES)
    fake = teacher.lora_view("fake_score", 2)
    assert student.network is fake.network is teacher.network
    before = says(one, teacher)
    scale = None if name == "flux_guidance" else TWO
    assert torch.equal(before, says(one, one.denoiser))
    assert torch.equal(says(one, student, scale), before)
    mine, its = student.parameters(), fake.parameters()
    assert not set(mine) & set(its)
    assert {p.requires_grad for p in [*mine.values(), *its.values()]} == {True}
    assert any(of_the_input(n) and "lora_" not in n for n in mine) == (name != "flux_guidance")
    assert [n for n in its if of_the_input(n)] == [] or name == "flux_guidance"
    tiny.alive(torch.nn.ParameterList(mine.values()), 0.2)
    assert torch.equal(says(one, teacher), before)
    assert torch.equal(says(one, fake), before)
    assert heard(one, student) > 1e-4


def example_of(one: Case) -> Batch:
    return Batch(one.x[:1], one.condition.rows(slice(0, 1)), torch.tensor([0]))


def check_addition(one: Case, student: NetworkDenoiser, injection: Injection) -> None:
    """Silent, then heard; all of it learns, and the network stays frozen."""
    assert torch.equal(says(one, student, TWO), says(one, one.denoiser))
    tiny.alive(injection, 0.1)
    student(one.x, one.t, with_guidance(one.condition, TWO, student)).value.square().mean().backward()
    assert [n for n, p in injection.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    assert {id(p) for p in student.network.parameters() if p.requires_grad} == set(map(id, injection.parameters()))
    assert heard(one, student) > 1e-4
    assert torch.equal(says(one, student), says(one, one.denoiser)), "a scale is left over from the pass before"


@pytest.mark.parametrize("name", NAMES)
def test_guidance_adapters_fit_the_blocks_of_every_family(case: Callable[[str], Case], name: str):
    one = case(name)
    student = with_adapters(one.denoiser.copy(), SCALES, example_of(one), 4, 8)
    check_addition(one, student, guidance_adapters(student))


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_fits_blocks_that_put_out_a_picture(case: Callable[[str], Case], name: str):
    one, example = case(name), example_of(case(name))
    if name not in PICTURES:
        kind = type(one.denoiser.network).__name__
        with pytest.raises(UserError, match=rf"student: {kind} computes \(.*\) of a sample \(.*\), which is no grid"):
            guide_for(one.denoiser, SCALES, example, 4, 8)
        return
    student = with_guide(one.denoiser.copy(), guide_for(one.denoiser, SCALES, example, 4, 8))
    check_addition(one, student, guide_of(student))


def test_both_streams_times_are_told_by_their_place_between_clean_data_and_noise(case: Callable[[str], Case]):
    """Whatever the family makes of the scheduler's timestep before its network hears it."""
    for name, clean, noise in [("flux", 0.0, 1.0), ("zimage", 1.0, 0.0)]:
        one = case(name)
        told = guidance_adapters(with_adapters(one.denoiser.copy(), SCALES, example_of(one), 4, 8)).told
        assert told.times == pytest.approx((clean, noise), abs=0.02)
    assert replace(case("flux").denoiser).adapters.names == (), "the cases are left as they were"
