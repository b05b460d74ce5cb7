"""Adapters on one frozen network: the teacher stays itself, and no gradient is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import SPAN, STEP, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.lora import without_adapters
from fewstep.models.schedule import Schedule
from tests.tiny import alive, dit, unet2d_classes

T = torch.tensor([0.3, 0.8])
LABELS = Condition.of_labels(torch.tensor([1, 3]))
NETWORKS = {"unet": (lambda: alive(unet2d_classes(8, 4)), 3), "dit": (lambda: alive(dit(8)), 4)}


@pytest.fixture(params=NETWORKS)
def teacher(request: pytest.FixtureRequest) -> NetworkDenoiser:
    return make_denoiser(NETWORKS[request.param][0](), Schedule(Flow(), Kind.VELOCITY))


@pytest.fixture
def x(request: pytest.FixtureRequest, teacher: NetworkDenoiser) -> Tensor:
    return torch.randn(2, 3 if teacher.family.component == "unet" else 4, 8, 8)


def shake(view: NetworkDenoiser) -> None:
    """Weights as after some training."""
    with torch.no_grad():
        for parameter in view.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def test_the_teacher_is_unchanged_bit_for_bit(teacher, x):
    before = teacher(x, T, LABELS).value
    student, fake = teacher.lora_view("student", 2), teacher.lora_view("fake_score", 3)
    assert torch.equal(teacher(x, T, LABELS).value, before)
    assert torch.equal(student(x, T, LABELS).value, before), "an adapter says nothing until it is trained"
    assert torch.equal(fake(x, T, LABELS).value, before)
    shake(student)
    shake(fake)
    changed = student(x, T, LABELS).value, fake(x, T, LABELS).value
    assert float((changed[0] - before).abs().max()) > 1e-3
    assert float((changed[0] - changed[1]).abs().max()) > 1e-3
    assert torch.equal(teacher(x, T, LABELS).value, before)
    assert torch.equal(student(x, T, LABELS).value, changed[0]), "switching back is exact"


def test_only_the_adapter_is_the_player(teacher):
    student, fake = teacher.lora_view("student", 2), teacher.lora_view("fake_score", 3)
    names = set(dict(teacher.network.named_parameters()))
    mine, its = set(student.parameters()), set(fake.parameters())
    assert mine
    assert not mine & its
    assert {name for name in names if "lora_" in name} == mine | its
    assert {p.requires_grad for n, p in teacher.network.named_parameters() if "lora_" not in n} == {False}
    assert teacher.adapters.names == ("student", "fake_score")
    assert (teacher.adapters.rank("student"), teacher.adapters.rank("fake_score")) == (2, 3)


def test_gradients_live_on_across_switches(teacher, x):
    """peft's switch freezes what is not active, and a backward after it then loses gradients without an error."""
    student, fake = teacher.lora_view("student", 2), teacher.lora_view("fake_score", 2)
    shake(student)
    shake(fake)

    def gradients(*, switch: bool) -> list[Tensor]:
        out = student(x, T, LABELS).x0
        if switch:
            with torch.no_grad():
                teacher(x, T, LABELS)
                fake(x, T, LABELS)
            out = out + 0 * fake(x, T, LABELS).x0
        loss = (out * student(x, T, LABELS).x0).mean()
        return list(torch.autograd.grad(loss, list(student.parameters().values())))

    plain, switched = gradients(switch=False), gradients(switch=True)
    for one, other in zip(plain, switched, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert sum(bool(one.any()) for one in switched) == len(switched)
    assert all(p.requires_grad for p in [*student.parameters().values(), *fake.parameters().values()])


def test_a_frozen_adapter_stays_frozen_across_switches(teacher, x):
    student, fake = teacher.lora_view("student", 2), teacher.lora_view("fake_score", 2)
    for parameter in fake.parameters().values():
        parameter.requires_grad_(False)
    for view in (fake, student, teacher, fake, student):
        view(x, T, LABELS)
    assert {p.requires_grad for p in fake.parameters().values()} == {False}
    assert {p.requires_grad for p in student.parameters().values()} == {True}


def test_a_follower_of_an_adapter_is_one_more_adapter(teacher, x):
    student = teacher.lora_view("student", 2)
    shake(student)
    target = student.follower("target")
    assert torch.equal(target(x, T, LABELS).value, student(x, T, LABELS).value)
    assert target.network is student.network
    assert {p.requires_grad for p in target.parameters().values()} == {False}
    assert [p.shape for p in target.parameters().values()] == [p.shape for p in student.parameters().values()]


def test_a_shared_network_is_not_copied(teacher):
    teacher.lora_view("student", 2)
    with pytest.raises(UserError, match=r"student.lora: the network is shared by adapters \(student\)"):
        replace(teacher).copy()


def test_convolutions_take_adapters_where_asked_for(teacher, x):
    """A UNet's are most of its weights; the transformer has one, which cuts patches."""
    before = teacher(x, T, LABELS).value
    lines = set(teacher.lora_view("lines", 2).parameters())
    teacher.adapters.convolutions = True
    student = teacher.lora_view("student", 2)
    four = {n.replace(".student.", ".lines.") for n, p in student.parameters().items() if p.ndim == 4}
    assert {n.replace(".student.", ".lines.") for n in student.parameters()} == lines | four
    assert len(four) == 2 * sum(isinstance(m, torch.nn.Conv2d) for m in without_adapters(teacher.network).modules())
    assert torch.equal(student(x, T, LABELS).value, before)
    shake(student)
    merged = replace(teacher, network=without_adapters(teacher.network, "student"))
    torch.testing.assert_close(merged(x, T, LABELS).value, student(x, T, LABELS).value, rtol=0, atol=1e-5)
    assert torch.equal(teacher(x, T, LABELS).value, before)


def test_a_convolution_in_groups_takes_none():
    """Its adapter would need a rank that the groups divide."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.Conv2d(4, 4, 3))
    view = replace(make_denoiser(unet2d_classes(8, 4), Schedule(Flow(), Kind.VELOCITY)), network=network)
    adapters = type(view.adapters)(network)
    adapters.convolutions = True
    adapters.add("student", 3)
    assert {name.split(".")[0] for name in adapters.parameters("student")} == {"1"}


@torch.no_grad()
def test_views_of_one_network_have_inputs_of_their_own(teacher, x):
    before = teacher(x, T, LABELS).value
    student, fake = teacher.lora_view("student", 2).with_scalar(SPAN, 10.0), teacher.lora_view("fake_score", 2)
    fake = fake.with_scalar(STEP)
    assert student.network is fake.network is teacher.network
    span, step = (LABELS.with_scalar(name, torch.tensor([0.3, 1.0])) for name in (SPAN, STEP))
    assert torch.equal(student(x, T, span).value, before)
    assert torch.equal(fake(x, T, step).value, before)
    mine, its = set(student.parameters()), set(fake.parameters())
    assert not mine & its
    assert {name for name in mine if ".second." in name} == {n for n in mine if f".second.{SPAN}." in n} != set()
    assert {p.requires_grad for p in [*student.parameters().values(), *fake.parameters().values()]} == {True}
    assert not [name for name in mine | its if "second" in name and "lora_" in name]
    shake(student)
    changed = student(x, T, span).value
    assert float((changed - student(x, T, LABELS).value).abs().max()) > 1e-4, "the input is heard"
    assert torch.equal(fake(x, T, step).value, before)
    assert torch.equal(teacher(x, T, LABELS).value, before)
    shake(fake)
    assert torch.equal(student(x, T, span).value, changed)


@torch.no_grad()
def test_a_branch_starts_where_it_leaves_and_goes_its_own_way(teacher, x):
    """Of the base, of a trained adapter with an input of its own, and of weights that nobody shares."""
    alone = teacher.branch("backbone")
    assert alone.network is not teacher.network
    student = teacher.lora_view("student", 2).with_scalar(SPAN, 10.0)
    shake(student)
    before = student(x, T, LABELS).value, teacher(x, T, LABELS).value
    for of, expected in zip((student, teacher), before, strict=True):
        branch = of.branch(f"backbone_{of.adapter}")
        assert branch.network is teacher.network
        assert torch.equal(branch(x, T, LABELS).value, expected)
        assert not set(branch.parameters()) & set(student.parameters())
        shake(branch)
        assert float((branch(x, T, LABELS).value - expected).abs().max()) > 1e-3
    assert torch.equal(student(x, T, LABELS).value, before[0])
    assert torch.equal(teacher(x, T, LABELS).value, before[1])
