"""Turns: who moves, when, and by which gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from fewstep.models.players import Average, Player
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState, _accumulate
from fewstep.training.method import Stage, Terms, Turn
from fewstep.training.optim import lr_factor
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, moved, weights


def test_a_turn_moves_its_players_and_nobody_else():
    """The routing of gradients of DMD2 with its GAN: three players, two kinds of turn."""
    state = begin(config(METHODS["dmd2_gan"], train={"steps": 6}))
    teacher = state.method.real_score.denoiser  # pyright: ignore[reportAttributeAccessIssue]
    before_teacher = teacher.mixture.means.clone()
    names = []
    for _ in range(6):
        before = weights(state)
        (report,) = go(state, 1)
        names.append((report.turn, moved(before, weights(state))))
        left = [p.grad for player in state.method.players.values() for p in player.parameters.values()]
        assert left == [None] * len(left), "a gradient is left for another turn"
    critic, student = ("critic", {"fake_score", "discriminator"}), ("student", {"student"})
    assert names == [critic, critic, student] * 2
    assert torch.equal(teacher.mixture.means, before_teacher)


def test_the_gradients_of_a_turn_reach_its_players_only():
    state = begin(config(METHODS["dmd2_gan"]))
    for step, expected in ((0, {"fake_score", "discriminator"}), (2, {"student"})):
        turn = state.method.turn(step)
        for name, optimizer in state.optimizers.items():
            optimizer.player.require_grad(name in turn.trains)
        _accumulate(state, turn)
        players = state.method.players.items()
        with_gradient = {name for name, one in players if any(p.grad is not None for p in one.parameters.values())}
        assert with_gradient == expected
        everyone = (p for _, one in players if _ in expected for p in one.parameters.values())
        assert sum(p.grad is not None and bool(p.grad.any()) for p in everyone) > 0
        for optimizer in state.optimizers.values():
            optimizer.adamw.zero_grad(set_to_none=True)


def test_gradients_are_switched_where_the_turn_changes_hands(monkeypatch):
    """At steps 0, 2, 3 and 5 of two rounds, and wherever training begins again."""
    state = begin(config(METHODS["dmd2"], train={"steps": 6}))
    switched, switch = [], Player.require_grad

    def counted(player: Player, flag: bool) -> None:
        switched.append(state.step)
        switch(player, flag)

    monkeypatch.setattr(Player, "require_grad", counted)
    go(state, 5)
    assert switched == [0, 0, 2, 2, 3, 3]
    for player in state.method.players.values():
        switch(player, True)
    go(state)
    assert switched[6:] == [5, 5]
    assert {
        name for name, one in state.method.players.items() if next(iter(one.parameters.values())).requires_grad
    } == {"student"}


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_the_student_steps_once_in_every_round(updates):
    rounds = 3
    method = {"name": "dmd2", "critic_updates": updates}
    state = begin(config(method, train={"steps": rounds * (updates + 1)}))
    reports = go(state)
    steps = {
        name: {int(one["step"]) for one in optimizer.adamw.state.values()}
        for name, optimizer in state.optimizers.items()
    }
    assert steps == {"student": {rounds}, "fake_score": {rounds * updates}}
    assert [r.turn for r in reports] == (["critic"] * updates + ["student"]) * rounds
    assert [set(r.gradient_norms) for r in reports] == ([{"fake_score"}] * updates + [{"student"}]) * rounds
    assert state.method.averages["ema"].updates == rounds, "the average moves with its source alone"


def test_accumulated_gradients_are_the_mean_of_the_micro_batches():
    run = config(METHODS["pretrain"], train={"accumulate": 2})
    together, apart = begin(run), begin(run)
    turn = together.method.turn(0)
    for state in (together, apart):
        state.method.players["student"].require_grad(True)
    _accumulate(together, turn)
    totals = {name: torch.zeros_like(p) for name, p in apart.method.players["student"].parameters.items()}
    for _ in range(2):
        batch = apart.next_batch()
        assert len(batch.x) == 4
        apart.method.turn(0).loss(batch, apart.rng).total.backward()
        for name, parameter in apart.method.players["student"].parameters.items():
            assert parameter.grad is not None
            totals[name] += parameter.grad / 2
            parameter.grad = None
    for name, parameter in together.method.players["student"].parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, totals[name], rtol=1e-5, atol=1e-7)


def test_accumulation_over_two_micro_batches_is_one_step():
    """Of a loss that is linear over samples and draws nothing, so that a step of 8 samples is one of 2 × 4."""
    ends = []
    for accumulate in (1, 2):
        state = begin(config(METHODS["pretrain"], train={"accumulate": accumulate, "steps": 3}))
        student = state.method.student

        def loss(batch, rng, student=student):
            t = torch.full((len(batch.x),), 0.5)
            return Terms({"l2": (student(batch.x, t, batch.condition).value - batch.x).square().mean()})

        state.method.turn = lambda step, loss=loss: Turn("student", ("student",), loss)
        go(state)
        ends.append(weights(state))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_terms_of_a_report_are_detached():
    (report,) = go(begin(config(METHODS["dmd2"])), 1)
    assert not any(value.requires_grad for value in report.terms.losses.values())
    assert set(report.terms.losses) == {"denoising"}


def test_the_total_is_the_sum_of_the_terms():
    terms = Terms({"a": torch.tensor(1.5), "b": torch.tensor(-0.25)}, {"not counted": torch.tensor(100.0)})
    assert float(terms.total) == 1.25


@pytest.mark.parametrize("name", ["dmd2_gan", "consistency"])
@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16_trains_float32_weights(name):
    state = begin(config(METHODS[name], train={"precision": "bf16", "steps": 3}))
    before = weights(state)
    reports = go(state)
    assert moved(before, weights(state)) == set(state.method.players)
    assert {p.dtype for one in state.method.players.values() for p in one.parameters.values()} == {torch.float32}
    assert {value.dtype for r in reports for value in r.terms.losses.values()} == {torch.float32}
    exact = go(begin_fp32(name))
    for one, other in zip(reports, exact, strict=True):
        assert float(one.terms.total) == pytest.approx(float(other.terms.total), rel=0.2, abs=0.05)


def begin_fp32(name: str):
    AcceleratorState._reset_state(True)
    return begin(config(METHODS[name], train={"steps": 3}))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("target", ["self", "ema"])
def test_a_target_in_bf16_takes_no_gradient_from_the_student(target):
    """Autocast may hand a weight's copy, made where no gradient is kept, to the pass that needs one."""
    method = {"name": "consistency", "intervals": 8, "target": target}
    norms = []
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state(True)
        (report,) = go(begin(config(method, train={"precision": precision})), 1)
        norms.append(float(report.gradient_norms["student"]))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert norms[0] > 0.01


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_last_step_of_a_rollout_in_bf16_keeps_its_gradient():
    norms = []
    for precision in ("bf16", "fp32"):
        AcceleratorState._reset_state(True)
        run = config(METHODS["dmd2"], student={"steps": 4}, train={"precision": precision})
        reports = go(begin(run), 3)
        norms.append(float(reports[-1].gradient_norms["student"]))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    assert norms[0] > 1e-3


STAGES = (Stage(0, 3), Stage(3, 5), Stage(5, 7))


def staged(folder: Path = Path("run")) -> TrainState:
    """Seven steps of consistency training in three stages, where "kept" rests and everything else moves."""
    run = config(METHODS["consistency"], folder, optim={"decay": "linear", "warmup": 2})
    state = begin(run)
    method, turn = state.method, state.method.turn
    method.averages = {**method.averages, "kept": Average.of(method.players["student"], 0.5)}
    method.turn = lambda step: replace(
        turn(step), stage=next(s for s in STAGES if step < s.end), resting=("kept",) if step != 6 else ()
    )
    return state


def test_a_stage_begins_with_empty_moments_and_fresh_averages():
    state = staged()
    optimizer, averages = state.optimizers["student"], state.method.averages
    kept: dict[str, torch.Tensor] = {}
    for step in range(7):
        before = {name: p.detach().clone() for name, p in state.method.players["student"].parameters.items()}
        kept = {name: value.clone() for name, value in averages["kept"].shadow.items()}
        go(state, 1)
        first = next(stage.start for stage in STAGES if step < stage.end)
        counts = {int(one["step"]) for one in optimizer.adamw.state.values()}
        assert counts == {step - first + 1}, "moments of this stage alone"
        assert averages["ema"].updates == averages["target"].updates == step - first + 1
        if step in (0, 3, 5):
            assert all(torch.equal(value, before[name]) for name, value in averages["kept"].shadow.items())
        elif step != 6:
            assert all(torch.equal(value, kept[name]) for name, value in averages["kept"].shadow.items())
    assert averages["kept"].updates == 1, "at step 6 it did not rest"
    assert not all(torch.equal(value, kept[name]) for name, value in averages["kept"].shadow.items())


def test_an_average_restarts_at_the_weights_of_its_stage():
    """After the first step of a stage the run's average is (1/10)·start + (9/10)·now: nothing older is in it."""
    state = staged()
    go(state, 3)
    start = {name: p.detach().clone() for name, p in state.method.players["student"].parameters.items()}
    go(state, 1)
    for name, now in state.method.players["student"].parameters.items():
        expected = 0.1 * start[name] + 0.9 * now.detach()
        torch.testing.assert_close(state.method.averages["ema"].shadow[name], expected, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_runs_its_course_in_every_stage():
    state, rates = staged(), []
    for _ in range(7):
        go(state, 1)
        rates.append(state.optimizers["student"].adamw.param_groups[0]["lr"] / state.config.optim.lr)
    expected = [
        lr_factor(state.config.optim, step - s.start, s.end - s.start) for s in STAGES for step in range(s.start, s.end)
    ]
    assert rates == pytest.approx(expected)
    assert rates == pytest.approx([0.5, 2 / 3, 1 / 3, 0.5, 0.5, 0.5, 0.5])


def test_a_run_of_one_stage_is_a_run_without():
    plain, one = (begin(config(METHODS["dmd2"], optim={"decay": "cosine"})) for _ in range(2))
    turn = one.method.turn
    one.method.turn = lambda step: replace(turn(step), stage=Stage(0, 7))
    go(plain)
    go(one)
    assert_same(everything(plain), everything(one))


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6])
def test_a_run_stops_inside_a_stage_at_its_end_and_after_it(tmp_path, stop):
    straight, first, second = (staged(tmp_path) for _ in range(3))
    go(straight)
    go(first, stop)
    checkpoint.save(tmp_path, first)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    assert_same(everything(first), everything(second))
    go(second)
    assert_same(everything(straight), everything(second))
