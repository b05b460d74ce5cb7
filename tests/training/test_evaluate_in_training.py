"""Evaluation inside training: the command's own figures, a run that does not notice it, and the best checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fewstep.commands import watch
from fewstep.commands.evaluate import Request, evaluate
from fewstep.commands.train import logged
from fewstep.config_file import parse
from fewstep.errors import UserError
from fewstep.training import best
from fewstep.training.assemble import assemble
from fewstep.training.checkpoint import list_checkpoints, sha256
from fewstep.training.finished import load_run
from fewstep.training.loop import TrainState
from fewstep.training.opening import open_sources
from fewstep.training.tracking import read_lines
from tests.training.digits import digits_run, digits_values
from tests.training.runs import METHODS, assert_same, begin, config, everything

FEATURES = "module:tests.training.digits.Blocks"
EVALUATE = {"every": 2, "samples": 24, "features": FEATURES, "batch_size": 7}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def finish(state: TrainState) -> TrainState:
    for _ in logged(state):
        pass
    return state


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "run" / "log.jsonl")


def figures(line: dict[str, Any]) -> dict[str, Any]:
    names = {key.removeprefix("evaluate/"): value for key, value in line.items() if key.startswith("evaluate/")}
    return {name: value for name, value in names.items() if name not in ("steps", "seed")}


def test_the_figures_are_those_of_the_command_on_the_checkpoint_of_that_step(tmp_path):
    """To the last bit, of the student's own two steps, whatever the batch size."""
    finish(digits_run(tmp_path, student={"steps": 2}, evaluate=EVALUATE,
                      train={"checkpoint_every": 2, "keep_last": 3}))  # fmt: skip
    run, seen = tmp_path / "run", {}
    for step, line in ((4, lines(tmp_path)[3]), (2, lines(tmp_path)[1])):
        assert line["step"] == step
        request = Request(str(run), "digits", FEATURES, 24, None, None, 24, 0)
        measured = evaluate(request)
        assert measured is not None
        told = measured[1].as_json()
        assert figures(line) == {name: told[name] for name in figures(line)}
        assert {"fd", "kid", "kid_stderr", "images", "features"} <= set(figures(line))
        assert line["evaluate/steps"] == 2
        seen[step] = line["evaluate/fd"]
        shutil.rmtree(run / "checkpoints" / "step-00000004", ignore_errors=True)
    assert seen[2] != seen[4]
    assert ["evaluate/fd" in line for line in lines(tmp_path)] == [False, True, False, True]


def test_a_run_is_the_same_with_evaluation_and_without(tmp_path):
    ends, streams, flags = [], [], []
    for name, section in (("without", {}), ("with", {**EVALUATE, "every": 1, "best": "fd"})):
        torch.manual_seed(5)
        state = finish(digits_run(tmp_path / name, steps=3, evaluate=section))
        ends.append(everything(state))
        streams.append(torch.random.get_rng_state())
        network = state.method.student.network
        flags.append([*(m.training for m in network.modules()), *(p.requires_grad for p in network.parameters())])
    assert_same(*ends)
    assert torch.equal(*streams)
    assert flags[0] == flags[1]
    assert "evaluate/fd" in lines(tmp_path / "with")[0]


def test_a_resumed_run_evaluates_each_step_once_and_alike(tmp_path):
    sections = {"evaluate": {**EVALUATE, "every": 1}, "train": {"checkpoint_every": 2}}
    finish(digits_run(tmp_path / "straight", **sections))
    for report in logged(digits_run(tmp_path / "cut", **sections)):
        if report.step == 3:
            break
    state = digits_run(tmp_path / "cut", **sections)
    assert state.step == 2
    finish(state)
    straight, cut = ([(line["step"], figures(line)) for line in lines(tmp_path / n)] for n in ("straight", "cut"))
    assert cut == straight
    assert [step for step, _ in cut] == [1, 2, 3, 4]


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Evaluations that say these figures at steps 1, 2, ..."""

    def told(_: Any, state: TrainState) -> dict[str, float]:
        return {"evaluate/fd": values[state.step - 1], "evaluate/kid": -values[state.step - 1]}

    monkeypatch.setattr(watch.Evaluation, "__call__", told)


def kept_weights(folder: Path) -> str:
    """The averaged weights that `best` leads to."""
    return sha256(next((folder / "run" / "best" / "checkpoints").glob("*/average-ema.safetensors")))


BEST = {"evaluate": {**EVALUATE, "every": 1, "best": "fd"}, "train": {"checkpoint_every": 4, "keep_last": 1}}


def test_the_best_checkpoint_is_kept_as_a_run_of_its_own(tmp_path, monkeypatch):
    """Though the run's own last one is another, and no checkpoint was due at that step."""
    scripted(monkeypatch, 3.0, 1.0, 1.0, 2.0)
    weights = {}
    for report in logged(state := digits_run(tmp_path, **BEST)):
        weights[report.step] = {name: v.clone() for name, v in state.method.averages["ema"].shadow.items()}
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004"]
    found = load_run(tmp_path / "run" / "best")
    assert found.step == 2, "the earlier of two equal ones"
    own = dict(found.student.network.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in weights[2].items())
    assert not all(torch.equal(value, own[name]) for name, value in weights[4].items())
    assert [path.name for path in (tmp_path / "run" / ".best").iterdir()] == ["step-00000002"]


def test_a_kill_before_the_link_is_made_good_at_the_next_start(tmp_path, monkeypatch):
    """The log says step 2 is the best and its checkpoint is saved: only `best` still leads to step 1."""
    scripted(monkeypatch, 3.0, 1.0, 2.0, 2.5)

    def killed(run: Path, checkpoint: Path) -> None:
        if checkpoint.name == "step-00000002":
            raise KeyboardInterrupt
        best_keep(run, checkpoint)

    best_keep = best.keep
    with monkeypatch.context() as patch:
        patch.setattr(best, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(digits_run(tmp_path, **BEST))
    assert best.kept_step(tmp_path / "run") == 1
    first = kept_weights(tmp_path)
    finish(digits_run(tmp_path, **BEST))
    assert best.kept_step(tmp_path / "run") == 2
    assert kept_weights(tmp_path) != first
    assert load_run(tmp_path / "run" / "best").step == 2


@pytest.mark.parametrize("at", ["copytree", "rename", "replace"])
def test_a_kill_while_the_best_is_replaced_leaves_the_one_before(tmp_path, monkeypatch, at):
    """Whatever was the last thing done, `best` is a whole checkpoint; and the next one takes its place."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
    (run / "config.json").write_text("{}")
    of = [run / "checkpoints" / f"step-{step:08d}" for step in (1, 2, 3)]
    best.keep(run, of[0])

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*{"copytree": (shutil, "copytree"), "rename": (Path, "rename"), "replace": (os, "replace")}[at],
                      stop)  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            best.keep(run, of[1])
    assert best.kept_step(run) == 1
    assert (run / "best" / "checkpoints" / "step-00000001" / "state.json").read_text() == "1"
    best.keep(run, of[2])
    assert best.kept_step(run) == 3
    shutil.rmtree(of[2])
    assert (run / "best" / "checkpoints" / "step-00000003" / "state.json").read_text() == "3"
    assert sorted(path.name for path in (run / ".best").iterdir()) == ["step-00000003"]


def test_a_run_from_its_start_has_no_best(tmp_path, monkeypatch):
    """A folder whose checkpoints are gone starts anew; what an earlier run left is nothing of its own."""
    scripted(monkeypatch, 2.0, 1.0, 3.0, 4.0)
    finish(digits_run(tmp_path, **BEST))
    before = kept_weights(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for report in logged(digits_run(tmp_path, **{**BEST, "optim": {"lr": 1e-2}})):
        assert best.kept_step(tmp_path / "run") == report.step
        if report.step == 2:
            break
    assert kept_weights(tmp_path) != before


def test_what_looks_on_has_nothing_compiled(tmp_path):
    """Not even of another size, for which training would be given other kernels."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        made.append(1)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    double(torch.ones(3))
    with watch.undisturbed(parse(digits_values(tmp_path, train={"compile": "blocks"}))):
        assert torch.equal(double(torch.ones(5)), torch.full((5,), 2.0))
    assert made == [1]
    double(torch.ones(5))
    assert made == [1, 1], "the count can rise"


def evaluated(*values: float, **terms: object) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(values, 1):
        yield {"step": number, "evaluate/fd": value, **{f"evaluate/{k}": v for k, v in terms.items()}}


def test_the_best_step_is_of_comparable_evaluations():
    few, many = list(evaluated(1.0, 2.0, images=10)), list(evaluated(9.0, 9.0, 5.0, 4.0, images=20))[2:]
    assert best.best_step([*few, *many, {"step": 5}], "fd", rising=False) == 4
    assert best.best_step(few, "fd", rising=True) == 2
    assert best.best_step([{"step": 1}], "fd", rising=False) is None


TOLD = [
    ({"features": "clasifier"}, "evaluate.features: ", "'clasifier'", "did you mean 'classifier'?"),
    ({"features": "classifier"}, "evaluate.features 'classifier': trained on 24 classes", "efficientnet-lite0"),
    ({"metrics": ["fdd"]}, "evaluate.metrics: none is named 'fdd'", "did you mean 'fd'?"),
    ({"metrics": ["diversity"], "best": "diversity"}, "evaluate.best: diversity", "neither more nor less"),
    ({"best": "accuracy"}, "evaluate.best: accuracy given; it cannot be measured here"),
    ({"reference": "digitz"}, "evaluate.reference: ", "'digitz'", "did you mean 'digits'?"),
    ({"samples": 5000}, "evaluate.reference: found 1618 images", "5000"),
]


@pytest.mark.parametrize(("changes", "fragments"), [(one, rest) for one, *rest in TOLD])
def test_a_run_that_cannot_be_evaluated_ends_before_it_begins(tmp_path, changes, fragments):
    state = digits_run(tmp_path, evaluate={**EVALUATE, **changes})
    with pytest.raises(UserError) as error:
        finish(state)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)
    assert state.step == 0
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"every": 1, "best": "fid"},
         "evaluate.best: 'fid' given, evaluate.metrics measures fd, kid, accuracy; did you mean 'fd'?"),
        ({"every": 1, "metrics": ["fd", "pr"], "best": "pr"},
         "evaluate.best: 'pr' given, evaluate.metrics measures fd, precision, recall, density, coverage"),
        ({"best": "fd"}, "evaluate.best: 'fd' given; it does nothing without every"),
        ({"samples": 10}, "evaluate.samples: 10 given; it does nothing without every"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_mean_is_one_line(tmp_path, section, line):
    with pytest.raises(UserError) as error:
        parse(digits_values(tmp_path, evaluate=section))
    assert str(error.value) == line


def test_points_in_a_plane_cannot_be_scored_as_pictures(tmp_path):
    state = begin(config(METHODS["dmd2"], tmp_path, evaluate={"every": 1}, train={"trackers": []}))
    with pytest.raises(UserError, match=r"evaluate.every: 1 given, but .* data.name=mixture are no pictures"):
        finish(state)


def one_rank(rank: int, folder: str, spread: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    run = parse(digits_values(Path(folder), evaluate={**EVALUATE, "best": "fd"}, health={"every": 2, "samples": 8},
                              train={"shard": spread}))  # fmt: skip
    two = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=not rank, device=torch.device("cpu"),
                          autocast=nullcontext, wait_for_everyone=dist.barrier)  # fmt: skip
    state = assemble(run, open_sources(run), two)  # pyright: ignore[reportArgumentType]
    finish(state)
    (Path(folder) / f"done-{rank}").write_text(str(state.step))
    dist.destroy_process_group()


@pytest.mark.parametrize("spread", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_evaluate_without_waiting_for_each_other_for_ever(tmp_path, spread):
    """Panel, evaluation and best checkpoint; the figures are one process's, but for sums in another order."""
    alone = tmp_path / "alone"
    finish(digits_run(alone, evaluate={**EVALUATE, "best": "fd"}, health={"every": 2, "samples": 8}))
    (tmp_path / "two").mkdir()
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, str(tmp_path / "two"), spread)) for rank in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
    assert [one.exitcode for one in ranks] == [0, 0]
    assert [(tmp_path / "two" / f"done-{rank}").read_text() for rank in range(2)] == ["4", "4"]
    for here, there in zip(lines(alone), lines(tmp_path / "two"), strict=True):
        assert here["step"] == there["step"]
        watched = [key for key in here if key.startswith(("evaluate/", "health/"))]
        assert watched == [key for key in there if key.startswith(("evaluate/", "health/"))]
        for key in watched:
            same = here[key] if isinstance(here[key], str) else pytest.approx(here[key], rel=0.02, abs=1e-3)
            assert there[key] == same, key
    assert best.kept_step(tmp_path / "two" / "run") == best.kept_step(alone / "run")


def test_the_best_is_written_beside_its_config(tmp_path, monkeypatch):
    """So that a folder moved elsewhere still opens."""
    scripted(monkeypatch, 1.0, 2.0)
    finish(digits_run(tmp_path, steps=2, **BEST))
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert load_run(moved / "best").step == 1
    assert json.loads((moved / "best" / "config.json").read_text()) == json.loads((moved / "config.json").read_text())
