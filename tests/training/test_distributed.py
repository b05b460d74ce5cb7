"""Two processes are one with the same global batch, whether each has all weights or a part of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.config import RunConfig
from fewstep.errors import UserError
from fewstep.models.shards import is_spread, whole
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from fewstep.training.optim import average_gradients
from fewstep.training.retention import list_checkpoints
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, begin, config, go, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STEPS, CUT = 7, 3
ALIKE = tuple(METHODS)
# A relativistic loss compares logits, and so does not see what is added to all of them: the gradient of this bias is 0
# but for rounding, of which Adam makes steps of full size. Nothing else depends on it.
UNSEEN = ("discriminator/heads.0.layers.4.bias", {"gdd", "self_adversarial"})
SPREAD = ("dmd2", "consistency", "scm", "flow_map", "scfm")  # in the quick tests; the slow one has all
CARRIED = ("dmd2", "consistency")


def run_of(name: str, folder: Path, shard: str = "none") -> RunConfig:
    folder.mkdir(exist_ok=True, parents=True)
    return config(METHODS[name], folder, train={"shard": shard})


def whole_weights(state: TrainState) -> dict[str, Tensor]:
    """Every player's and average's tensors; all processes must ask."""
    players = {f"{n}/{k}": whole(p) for n, one in state.method.players.items() for k, p in one.parameters.items()}
    averages = {f"average {n}/{k}": whole(v) for n, a in state.method.averages.items() for k, v in a.shadow.items()}
    return {key: value.clone() for key, value in {**players, **averages}.items()}


def straight(name: str, folder: Path) -> dict[str, Tensor]:
    state = begin(run_of(name, folder))
    start = weights(state)
    go(state, STEPS)
    assert max(float((v - start[k]).abs().max()) for k, v in weights(state).items()) > 0.01, "nothing moved"
    return whole_weights(state)


def gradients_are_averaged(_folder: Path) -> None:
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 2), float(rank)).t()
    parameters[1].grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert parameters[1].grad.tolist() == [1.5, 3.0, 4.5]
    assert parameters[2].grad is None


def train_all(folder: Path, names: tuple[str, ...], shard: str) -> None:
    rank = dist.get_rank()
    for name in names:
        state = begin_rank(run_of(name, folder / f"{name}-{rank}", shard))
        spread = [p for one in state.method.players.values() for p in one.parameters.values() if is_spread(p)]
        assert bool(spread) == (shard == "full")
        go(state, STEPS)
        save_file(whole_weights(state), folder / f"{name}-{shard}-{rank}.safetensors")


def two_ranks(folder: Path) -> None:
    gradients_are_averaged(folder)
    train_all(folder, ALIKE, "none")
    train_all(folder, SPREAD, "full")


def assert_alike(folder: Path, names: tuple[str, ...], shard: str, expected: dict[str, dict[str, Tensor]]) -> None:
    for name in names:
        first, second = (load_file(folder / f"{name}-{shard}-{rank}.safetensors") for rank in range(2))
        assert first.keys() == expected[name].keys()
        for key, value in expected[name].items():
            assert torch.equal(first[key], second[key]), key
            if key != UNSEEN[0] or name not in UNSEEN[1]:
                torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5)


def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    assert launch(two_ranks, tmp_path / "two") == [0, 0]
    expected = {name: straight(name, tmp_path / name) for name in ALIKE}
    assert_alike(tmp_path / "two", ALIKE, "none", expected)
    assert_alike(tmp_path / "two", SPREAD, "full", expected)


@pytest.mark.slow
def test_every_method_is_the_same_when_spread(tmp_path):
    names = tuple(name for name in ALIKE if name not in SPREAD)
    assert launch(partial(train_all, names=names, shard="full"), tmp_path / "two") == [0, 0]
    assert_alike(tmp_path / "two", names, "full", {name: straight(name, tmp_path / name) for name in names})


def carry(folder: Path) -> None:
    """Go on from what one process has saved; save what one process goes on from; and stop and go on here."""
    for name in CARRIED:
        for shard in ("none", "full"):
            run = run_of(name, folder / f"{name}-{shard}", shard)
            state = begin_rank(run)
            checkpoint.restore(list_checkpoints(folder / name)[-1], state)
            assert state.step == CUT
            go(state)
            end = whole_weights(state)
            if dist.get_rank() == 0:
                save_file(end, folder / f"{name}-{shard}.safetensors")
            uncut, cut, again = (begin_rank(run) for _ in range(3))
            go(uncut)
            go(cut, CUT)
            checkpoint.save(run.run.dir, cut)
            checkpoint.restore(list_checkpoints(run.run.dir)[-1], again)
            go(again)
            there, here = whole_weights(uncut), whole_weights(again)
            assert [key for key in there if not torch.equal(there[key], here[key])] == []


def test_checkpoints_are_of_any_number_of_processes(tmp_path):
    for name in CARRIED:
        state = begin(run_of(name, tmp_path / name))
        go(state, CUT)
        checkpoint.save(tmp_path / name, state)
    assert launch(carry, tmp_path) == [0, 0]
    for name in CARRIED:
        expected = straight(name, tmp_path / "straight")
        (alone,) = list_checkpoints(tmp_path / name)
        for shard in ("none", "full"):
            state = begin(run_of(name, tmp_path / "alone"))
            (saved,) = list_checkpoints(tmp_path / f"{name}-{shard}")
            sets = {path.name.removesuffix(".safetensors") for path in saved.iterdir()}
            assert sets == {path.name.removesuffix(".safetensors") for path in alone.iterdir()}
            assert (saved / "player-student").is_dir() == (shard == "full")
            checkpoint.restore(saved, state)
            go(state)
            from_one, from_two = load_file(tmp_path / f"{name}-{shard}.safetensors"), whole_weights(state)
            for key, value in expected.items():
                torch.testing.assert_close(from_one[key], value, rtol=0, atol=1e-5)
                torch.testing.assert_close(from_two[key], value, rtol=0, atol=1e-5)


def norms_of_parts(folder: Path) -> None:
    """The norm before clipping, and the average that takes the student's place for samples."""
    state = begin_rank(run_of("consistency", folder / str(dist.get_rank()), "full"))
    reports = go(state, 3)
    norms = torch.stack([report.gradient_norms["student"] for report in reports])
    kept = whole_weights(state)
    student, average = state.method.players["student"], state.method.averages["ema"]
    with average.swapped():
        x, t = torch.ones(4, 2), torch.full((4,), 0.5)
        labels = state.next_batch().condition
        output = state.method.student(x, t, labels.rows(slice(0, 1)).expand(4)).value.detach()
        for name, p in student.parameters.items():
            assert torch.equal(whole(p), kept[f"average ema/{name}"])
    for key, value in whole_weights(state).items():
        assert torch.equal(value, kept[key])
    save_file({"norms": norms, "output": output}, folder / f"norms-{dist.get_rank()}.safetensors")


def test_norms_and_averages_of_parts_are_those_of_the_whole(tmp_path):
    assert launch(norms_of_parts, tmp_path) == [0, 0]
    state = begin(run_of("consistency", tmp_path / "alone"))
    expected = torch.stack([report.gradient_norms["student"] for report in go(state, 3)])
    first, second = (load_file(tmp_path / f"norms-{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first["norms"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first["norms"], second["norms"])
    assert float(first["output"].abs().max()) > 0


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"compile": "blocks"}}, "train.shard: full given, with train.compile; leave one of them out"),
        ({"memory": {"offload": True}}, "train.shard: full given, with memory.offload; leave one of them out"),
    ],
)
def test_what_sharding_does_not_go_with(tmp_path, sections, told):
    values = {**sections, "train": {**sections.get("train", {}), "shard": "full"}}
    with pytest.raises(UserError, match=told):
        begin(config(METHODS["pretrain"], tmp_path, **values))
