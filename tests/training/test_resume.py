"""A run that was stopped and started again is the run that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from fewstep import registry
from fewstep.commands.train import logged
from fewstep.config import RunConfig
from fewstep.data.samples import Samples
from fewstep.models.load import load_denoiser
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState, train
from fewstep.training.opening import Sources
from tests.tiny import alive, unet2d_classes
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, sources


def resumed(run: RunConfig, start: Sources | None = None) -> TrainState:
    state = begin(run, start)
    checkpoint.restore(checkpoint.list_checkpoints(run.run.dir)[-1], state)
    return state


def strides(state: TrainState) -> dict[str, tuple[int, ...]]:
    """How the fake score's first moments lie in memory."""
    optimizer = state.optimizers["fake_score"]
    parameters = optimizer.player.parameters.items()
    return {name: optimizer.adamw.state[parameter]["exp_avg"].stride() for name, parameter in parameters}


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_is_bit_identical(tmp_path, name):
    """In the warm-up, when every player has moved; the slow test below stops after each kind of turn."""
    stop, run = 4, config(METHODS[name], tmp_path, optim={"warmup": 5, "decay": "cosine"})
    straight = begin(run)
    go(straight)
    first = begin(run)
    go(first, stop)
    checkpoint.save(tmp_path, first)
    second = resumed(run)
    assert second.step == stop
    assert_same(everything(first), everything(second))
    go(second)
    assert_same(everything(straight), everything(second))


@pytest.mark.parametrize(("workers", "accumulate"), [(2, 1), (0, 2), (2, 2)])
def test_neither_workers_nor_accumulation_lose_the_place(tmp_path, workers, accumulate):
    sections = {"data": {"workers": workers}, "train": {"steps": 5, "accumulate": accumulate}}
    run = config(METHODS["dmd2"], tmp_path, **sections)
    straight = begin(config(METHODS["dmd2"], tmp_path, train=sections["train"]))
    go(straight)
    first = begin(run)
    go(first, 3)
    checkpoint.save(tmp_path, first)
    second = resumed(run)
    go(second)
    assert second.loader.position == 5 * 8
    assert_same(everything(straight), everything(second))


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_stages_keep_their_place_with_workers_and_accumulation(tmp_path, stop):
    """Seven steps in stages of 2, 3 and 2: stopped inside the first and the second, and between them."""
    sections = {"data": {"workers": 2}, "train": {"accumulate": 2}, "optim": {"warmup": 2, "decay": "linear"}}
    run = config(METHODS["progressive"], tmp_path, **sections)
    straight = begin(config(METHODS["progressive"], tmp_path, **{**sections, "data": {}}))
    stages = [straight.method.turn(step).stage for step in range(7)]
    assert [stage.start for stage in stages if stage is not None] == [0, 0, 2, 2, 2, 5, 5]
    go(straight)
    first = begin(run)
    go(first, stop)
    checkpoint.save(tmp_path, first)
    second = resumed(run)
    go(second)
    assert_same(everything(straight), everything(second))


def test_every_registered_method_is_resumed():
    assert {method["name"] for method in METHODS.values()} == set(registry.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_may_stop_after_any_turn(tmp_path, name):
    """Between every two kinds of turn that follow each other in ten steps, stages included, in a warm-up and after."""
    run = config(METHODS[name], tmp_path, optim={"warmup": 6, "decay": "linear"}, train={"steps": 10, "keep_last": 10})
    straight = begin(run)
    turns = [straight.method.turn(step) for step in range(10)]
    for report in train(straight):
        checkpoint.save(tmp_path, straight)
        assert report.turn == turns[report.step - 1].name
    found, seen = checkpoint.list_checkpoints(tmp_path), set()
    assert len(found) == 10
    for stop in range(1, 10):
        before, after = turns[stop - 1], turns[stop]
        kind = (before.name, after.name, after.stage is not None and after.stage.start == stop)
        if kind not in seen:
            seen.add(kind)
            again = begin(run)
            checkpoint.restore(found[stop - 1], again)
            go(again)
            assert_same(everything(straight), everything(again))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_go_on_where_they_were(tmp_path, workers):
    """Eleven samples, eight a step: stopped in the third epoch, of which two samples had been seen."""

    class Eleven:
        shape, classes, length = (2,), sources().dataset.classes, 11

        def batch(self, indices):
            return sources().dataset.batch(indices)

    def start() -> Sources:
        return Sources(Eleven(), sources().teacher, sources().student)

    run = config(METHODS["consistency"], tmp_path, data={"workers": workers})
    straight = begin(run, start())
    go(straight)
    first = begin(run, start())
    go(first, 3)
    assert divmod(first.loader.position, 11) == (2, 2)
    checkpoint.save(tmp_path, first)
    second = resumed(run, start())
    go(second)
    assert_same(everything(straight), everything(second))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_forty_steps_are_thirteen_and_twenty_seven(tmp_path, name):
    """With loader processes, accumulation, a warm-up and the panel's readings; the first part ends without a word."""
    sections = {
        "data": {"workers": 2},
        "train": {"steps": 40, "accumulate": 2, "checkpoint_every": 13, "trackers": []},
        "optim": {"warmup": 20, "decay": "linear"},
        "health": {"every": 5},
    }
    cut, whole = (config(METHODS[name], made(tmp_path / one), **sections) for one in ("cut", "whole"))
    straight = begin(whole)
    for _ in logged(straight):
        pass
    for report in logged(begin(cut)):
        if report.step == 17:
            break
    again = begin(cut)
    assert checkpoint.restore_last(tmp_path / "cut" / "checkpoints", again, print) is not None
    assert again.step == 13
    for _ in logged(again):
        pass
    assert_same(everything(straight), everything(again))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_images_resume_bit_identically_in_their_memory_format(tmp_path):
    DDIMPipeline(alive(unet2d_classes(8, 5, 1)), DDIMScheduler()).save_pretrained(tmp_path / "teacher")
    mixture = sources().dataset

    class Images:
        shape, classes, length = (1, 8, 8), mixture.classes, None

        def batch(self, indices):
            vectors = mixture.batch(indices)
            return Samples(vectors.images.repeat(1, 32).reshape(-1, 1, 8, 8), vectors.labels)

    def start() -> Sources:
        teacher = load_denoiser(str(tmp_path / "teacher"))
        return Sources(Images(), teacher, teacher.copy())

    run = config(METHODS["dmd2"], tmp_path / "run", data={"batch_size": 2}, train={"steps": 6})
    straight = begin(run, start())
    go(straight)
    first = begin(run, start())
    go(first, 3)
    checkpoint.save(run.run.dir, first)
    second = resumed(run, start())
    assert strides(first) == strides(second), "another layout takes another kernel"
    assert any(one[1] == 1 < one[2] for one in strides(first).values() if len(one) == 4), "nothing is channels-last"
    go(second)
    assert_same(everything(straight), everything(second))


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path):
    def run(folder: Path, steps: int) -> RunConfig:
        train = {"steps": steps, "checkpoint_every": 3, "log_every": 1}
        return config(METHODS["dmd2"], folder, train=train)

    def lines(folder: Path) -> list[dict]:
        read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key != "seconds" and key[:6] != "speed/"} for line in read
        ]

    for _ in logged(begin(run(tmp_path / "straight", 7))):
        pass
    cut = tmp_path / "cut"
    for report in logged(begin(run(cut, 7))):
        if report.step == 5:
            break
    with (cut / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "turn": "stud')  # torn by the kill
    state = begin(run(cut, 7))
    checkpoint.restore(checkpoint.list_checkpoints(cut / "checkpoints")[-1], state)
    assert state.step == 3
    for _ in logged(state):
        pass
    assert lines(cut) == lines(tmp_path / "straight")
    assert [line["step"] for line in lines(cut)] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["turn"] for line in lines(cut)] == ["critic", "critic", "student"] * 2 + ["critic"]


def test_resuming_a_finished_run_does_nothing(tmp_path):
    run = config(METHODS["pretrain"], tmp_path, train={"steps": 2})
    state = begin(run)
    go(state)
    checkpoint.save(tmp_path, state)
    again = resumed(run)
    assert go(again) == []
    assert_same(everything(state), everything(again))


def test_more_steps_go_on_from_the_end(tmp_path):
    short, long = (config(METHODS["pretrain"], tmp_path, train={"steps": steps}) for steps in (2, 4))
    state = begin(short)
    go(state)
    checkpoint.save(tmp_path, state)
    again = resumed(long)
    straight = begin(long)
    go(again)
    go(straight)
    assert_same(everything(straight), everything(again))


def test_the_data_and_the_noise_differ_by_seed():
    one, other = (begin(config(METHODS["pretrain"], run={"seed": seed})) for seed in (0, 1))
    assert not torch.equal(one.rng.normal(torch.empty(4, 2)), other.rng.normal(torch.empty(4, 2)))
