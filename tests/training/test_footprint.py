"""What a dry run says against what a real run of the same config holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.evaluations import module_of, saved
from benchmarks.step import parts_of
from fewstep.cli import main
from fewstep.commands.configs import find
from fewstep.commands.dry_run import measured, table
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.training.assemble import assemble, open_sources
from fewstep.training.loop import TrainState, train

SMALL = "{num_layers: 2, num_attention_heads: 2, attention_head_dim: 16, patch_size: 4}"
DIT = ["student.new=null", f"student.new={{network: DiTTransformer2DModel, config: {SMALL}}}"]
RUNS = {
    "dmd2": ("dmd2", []),
    "dmd2 with a discriminator": ("dmd2", ["method.gan_weight=0.1"]),
    "dmd2 on adapters": ("dmd2", ["student.lora=4", "method.fake_score_lora=4"]),
    "recomputed": ("dmd2", ["memory.checkpoint=[student,fake_score]"]),
    "scm": ("scm", []),
    "flow_map": ("flow_map", []),
    "transformer": ("pretrain", DIT),
}


def config(name: str, folder: Path) -> RunConfig:
    method, words = RUNS[name]
    return load(find(Path(f"emoji32/{method}")), [f"run.dir={folder}", "data.batch_size=4", *words])


def real(run: RunConfig) -> TrainState:
    accelerator = Accelerator(cpu=True)
    return assemble(run, open_sources(run), accelerator)


@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_a_dry_run_says_what_the_run_holds(name, tmp_path):
    run = config(name, tmp_path)
    said, state = measured(run), real(run)
    held = {}
    for turn_name in said.turns:
        state.step = next(step for step in range(20) if state.method.turn(step).name == turn_name)
        state.rng.integer = lambda high: high - 1  # the most, as the dry run takes it
        with saved([module_of(part) for part in parts_of(state)]) as total:
            next(train(state))
        held[turn_name] = total[0]
    moments = {
        name: sum(v.numel() * v.element_size() for s in one.adamw.state.values() for v in s.values())
        for name, one in state.optimizers.items()
    }
    assert dict(said.optimizer) == moments
    assert sum(said.parameters.values()) + said.other_parameters == all_weights(state)
    assert said.averages["ema"] == sum(4 * p.numel() for p in state.method.players["student"].parameters.values())
    for turn_name, turn in said.turns.items():
        assert turn.activations == pytest.approx(held[turn_name], rel=0.1), turn_name
    assert said.peak > said.resident > 0


def all_weights(state: TrainState) -> int:
    tensors = {id(t): t for part in parts_of(state) for t in all_of(module_of(part))}
    tensors |= {id(p): p for player in state.method.players.values() for p in player.parameters.values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def all_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_the_evaluations_of_dmd2(tmp_path):
    said = measured(config("dmd2", tmp_path))
    assert {name: dict(turn.evaluations) for name, turn in said.turns.items()} == {
        "critic": {"student: forward": 4, "fake_score: forward and backward": 4},
        "student": {"student: forward and backward": 4, "teacher: forward": 4, "fake_score: forward": 4},
    }


@pytest.mark.slow
def test_memory_settings_show(tmp_path):
    plain, less = (
        measured(config("dmd2", tmp_path).model_copy(update=update))
        for update in ({}, {"memory": config("dmd2", tmp_path).memory.model_copy(update={"teacher": "float8"})})
    )
    assert less.parameters["teacher"] < 0.4 * plain.parameters["teacher"]
    assert less.parameters["student"] == plain.parameters["student"]
    bf16 = load(find(Path("emoji32/dmd2")), [f"run.dir={tmp_path}", "data.batch_size=4", "train.precision=bf16"])
    turn = measured(bf16).turns["student"]
    copies = turn.gradients / 2  # of the weights, which mixed precision keeps beside them
    assert 0.7 < (turn.activations - copies) / plain.turns["student"].activations < 0.9


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "needs.json"
    words = ["train", "emoji32/dmd2", f"run.dir={tmp_path / 'run'}", "--dry-run", "--json", str(out)]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    told = capsys.readouterr().out
    said = json.loads(out.read_text())
    assert f"{said['peak'] / 2**20:.1f} MiB" in told
    assert "turn student: trains student" in told
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_the_figures_go_to_a_file_of_a_dry_run_only(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "emoji32/dmd2", "--json", str(tmp_path / "x.json")])
    assert end.value.code == 2
    assert "--json: given without --dry-run" in capsys.readouterr().err


def test_offloading_is_mentioned(tmp_path):
    run = config("dmd2", tmp_path)
    run = run.model_copy(update={"memory": run.memory.model_copy(update={"offload": True})})
    assert any("waits on the host" in line for line in table(measured(run), run))
