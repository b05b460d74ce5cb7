"""From a config to a run: what fits together, what does not, and what a LoRA shares."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.data.mixture import MixtureSet
from fewstep.data.samples import Unlabelled
from fewstep.diffusion.gaussian import five_modes
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training.assemble import assemble
from fewstep.training.opening import Sources, _check_fit, open_sources
from tests.training.runs import (
    METHODS,
    assert_same,
    begin,
    config,
    everything,
    go,
    moved,
    sources,
    vector_denoiser,
    weights,
)

NEW: dict[str, Any] = {"network": "UNet2DModel", "process": "flow", "prediction": "velocity", "config": {
    "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}}  # fmt: skip


def lora_sources() -> Sources:
    teacher = vector_denoiser()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Sources(MixtureSet(five_modes(labelled=True)), teacher, teacher.lora_view("student", 2))


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_student_and_fake_score_as_adapters_on_one_frozen_teacher(gan):
    method = {"name": "dmd2", "critic_updates": 1, "fake_score_lora": 3, "gan_weight": gan}
    start = lora_sources()
    state = begin(config(method, student={"lora": 2}, train={"steps": 6}), start)
    assert isinstance(start.teacher, NetworkDenoiser)
    network = start.teacher.network
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if "lora_" not in name}
    ranks = {name: {min(p.shape) for p in state.method.players[name].parameters.values()} for name in
             ("student", "fake_score")}  # fmt: skip
    assert max(ranks["student"]) == 2
    assert max(ranks["fake_score"]) == 3
    everyone = {"student", "fake_score"} | ({"discriminator"} if gan else set())
    assert set(state.method.players) == everyone
    before = weights(state)
    reports = go(state)
    assert moved(before, weights(state)) == everyone
    assert all(float(norm) > 0 for report in reports for norm in report.gradient_norms.values())
    after = dict(network.named_parameters())
    assert [name for name, value in frozen.items() if not torch.equal(after[name], value)] == []


def test_adapters_resume(tmp_path):
    from fewstep.training import checkpoint

    run = config({"name": "dmd2", "critic_updates": 1, "fake_score_lora": 2}, tmp_path, student={"lora": 2})
    straight, first = begin(run, lora_sources()), begin(run, lora_sources())
    go(straight)
    go(first, 3)
    checkpoint.save(tmp_path, first)
    second = begin(run, lora_sources())
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[0], second)
    go(second)
    assert_same(everything(straight), everything(second))


def test_a_student_lora_needs_a_fake_score_lora():
    with pytest.raises(UserError, match=r"student.lora: the network is shared by adapters \(student\); give every"):
        begin(config(METHODS["dmd2"], student={"lora": 2}), lora_sources())


def test_a_lora_target_follows_its_student():
    state = begin(config(METHODS["consistency"], student={"lora": 2}), lora_sources())
    before = {name: p.detach().clone() for name, p in state.method.averages["target"].shadow.items()}
    student = {name: p.detach().clone() for name, p in state.method.players["student"].parameters.items()}
    for name, value in before.items():
        assert torch.equal(value, student[name]), "the target starts as the student"
    go(state, 1)
    for name, value in state.method.averages["target"].shadow.items():
        now = state.method.players["student"].parameters[name]
        torch.testing.assert_close(value.data, 0.8 * before[name] + 0.2 * now.detach())


def test_new_weights_do_not_depend_on_what_was_drawn_before():
    made = []
    for drawn in (0, 7):
        torch.randn(drawn)
        made.append(weights(begin(config(METHODS["dmd2_gan"]))))
    assert_same(made[0], made[1])


@pytest.mark.parametrize("lora", [None, 2])
def test_opened_sources_do_not_depend_on_what_was_drawn_before(tmp_path, lora):
    from diffusers import DDIMPipeline, DDIMScheduler

    from tests.tiny import unet2d_classes

    DDIMPipeline(unet2d_classes(8, 10, 1), DDIMScheduler()).save_pretrained(tmp_path)
    run = config(METHODS["pretrain"], data={"name": "digits"}, teacher={"path": str(tmp_path)}, student={"lora": lora})
    made = []
    for drawn in (0, 7):
        torch.randn(drawn)
        student = open_sources(run).student
        assert (student.adapter == "student") == (lora is not None)
        made.append({name: p.detach().clone() for name, p in student.parameters().items()})
    assert_same(made[0], made[1])


def test_a_network_from_scratch_fits_its_data():
    start = open_sources(config(METHODS["pretrain"], data={"name": "digits"}, student={"new": NEW}))
    made: Any = start.student.network.config
    assert (made["in_channels"], made["sample_size"], made["num_class_embeds"]) == (1, 8, 11)
    assert start.teacher is None
    assert start.student.null is not None
    assert start.student.null.labels is not None
    assert start.student.null.labels.tolist() == [10]


def test_an_unconditional_network_gets_no_labels():
    new = {**NEW, "config": {**NEW["config"], "num_class_embeds": None}}
    start = open_sources(config(METHODS["pretrain"], data={"name": "digits"}, student={"new": new}))
    assert start.student.null is None
    assert isinstance(start.dataset, Unlabelled)
    (report,) = go(begin(config(METHODS["pretrain"], data={"batch_size": 2}), start), 1)
    assert float(report.terms.total) > 0


def test_what_must_fit():
    mixture, student = MixtureSet(five_modes(labelled=True)), vector_denoiser()
    _check_fit("teacher", student, mixture)
    with pytest.raises(UserError, match=r"data.name: 0 classes in the data, 5 in the teacher; they must agree"):
        _check_fit("teacher", student, MixtureSet(five_modes(labelled=False)))
    student.network.config = {"in_channels": 4}  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"data.name: samples have 2 channels, the student takes 4"):
        _check_fit("student", student, mixture)


def test_an_override_for_no_player_is_refused():
    run = config(METHODS["dmd2"], optim={"players": {"fake": {"lr": 1.0}}})
    with pytest.raises(UserError, match=r"optim.players.fake: no such player.*players: student, fake_score"):
        begin(run)


def test_the_batch_divides_over_the_processes():
    three = SimpleNamespace(num_processes=3)
    told = r"data.batch_size: 8 does not divide into 3 processes × train.accumulate=1; give a multiple of 3"
    with pytest.raises(UserError, match=told):
        assemble(config(METHODS["dmd2"]), sources(), three)  # pyright: ignore[reportArgumentType]


def test_the_teacher_is_guided_by_the_run_s_scale():
    state = begin(config(METHODS["dmd2"], teacher={"guidance": 2.0}))
    assert state.method.real_score.scale == 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_distillation_needs_a_teacher():
    start = replace(sources(), teacher=None)
    for name in ("dmd2", "consistency"):
        with pytest.raises(UserError, match=r"teacher.path: missing"):
            begin(config(METHODS[name]), start)
    with pytest.raises(UserError, match=r"teacher.path: missing; give a teacher, or student.new"):
        open_sources(config(METHODS["pretrain"], data={"name": "digits"}))
