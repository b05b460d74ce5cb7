"""What a dry run says against what a real run of the same config holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.evaluations import module_of, saved
from benchmarks.step import parts_of
from fewstep import registry
from fewstep.cli import main
from fewstep.commands.configs import find, shipped
from fewstep.commands.dry_run import measured, table
from fewstep.config import RunConfig
from fewstep.config_file import load
from fewstep.models.load import load_denoiser
from fewstep.training.assemble import assemble
from fewstep.training.footprint import Footprint
from fewstep.training.loop import TrainState, train
from fewstep.training.opening import open_sources
from tests import tiny_pipelines
from tests.data.cache_lab import pictures
from tests.training.digits import digits_teacher
from tests.training.runs import made_pairs

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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "flow_map" else n for n in list(RUNS)[1:]]
)
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


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any is an error from here on."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)


PICTURES = [name for name in shipped() if name.startswith(("demo/", "emoji32/"))]
PROMPTS = {"sd15_dmd2": "sd15", "sdxl_dmd2_lora": "sdxl", "flux_scfm": "flux", "pixart_swiftbrush": "pixart",
           "sana_scm": "sana"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_every_shipped_config_is_measured_before_a_weight_is_read(name, tmp_path, monkeypatch):
    words = [f"run.dir={tmp_path / 'run'}"]
    if name == "emoji32/reflow":
        words.append(f"method.pairs={made_pairs(tmp_path / 'pairs.safetensors', (3, 32, 32), 24)}")
    run = load(find(Path(name)), words)
    no_weights(monkeypatch)
    checked(measured(run), run)


def checked(said: Footprint, run: RunConfig) -> None:
    """Whatever the method: players that move, their moments, and what each turn computes and keeps."""
    movers = {name for turn in said.turns.values() for name in turn.trains}
    assert movers == set(said.optimizer)
    assert "student" in movers
    assert "ema" in said.averages
    for turn in said.turns.values():
        assert turn.evaluations
        assert min(turn.evaluations.values()) > 0
        assert turn.gradients > 0
        assert turn.activations > 0
    held = [*said.parameters.values(), said.other_parameters, *said.optimizer.values(), *said.averages.values()]
    assert said.resident == sum(held)
    assert said.peak == said.resident + max(turn.activations + turn.gradients for turn in said.turns.values())
    assert any(f"{said.peak / 2**20:.1f} MiB" in line for line in table(said, run))


def test_every_method_has_a_shipped_config():
    methods = {load(find(Path(name)), []).method.name for name in PICTURES}
    assert methods == set(registry.names())


def test_every_config_of_prompts_is_measured():
    assert {f"text_to_image/{name}" for name in PROMPTS} == {n for n in shipped() if n.startswith("text_to_image/")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("name", PROMPTS)
def test_configs_of_prompts_are_measured_before_a_weight_is_read(name, tmp_path, monkeypatch):
    """On pipelines of the same classes, whose widths are tiny."""
    teacher, cache = tiny_pipelines.saved(PROMPTS[name], tmp_path / "teacher"), tmp_path / "cache"
    words = ["--data", "captions", "--path", str(pictures(tmp_path / "pictures", side=32)), "--size", "32"]
    with pytest.raises(SystemExit) as end:
        main(["cache", str(teacher), str(cache), *words])
    assert not end.value.code
    run = load(find(Path(f"text_to_image/{name}")), [f"teacher.path={teacher}", f"data.path={cache}"])
    no_weights(monkeypatch)
    checked(measured(run), run)


def test_a_dry_run_of_a_hub_name_fetches_no_weights(tmp_path, monkeypatch):
    folder = digits_teacher(tmp_path / "teacher")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    network = load_denoiser("someone/something", "meta").network
    assert all(p.is_meta for p in network.parameters())
    assert "*/*.json" in asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_weights_in_bfloat16_are_counted_as_they_are(tmp_path):
    """Networks, moments, gradients and averages of a real run; activations without copies of the weights."""
    words = [f"run.dir={tmp_path}", "data.batch_size=2", "train.precision=bf16_weights"]
    run = load(find(Path("emoji32/consistency")), words)
    said, state = measured(run), real(run)
    next(train(state))
    assert said.parameters["student"] == sum(t.numel() * t.element_size() for t in all_of(state.method.student.network))
    moments = state.optimizers["student"].adamw.state.values()
    assert said.optimizer["student"] == sum(v.numel() * v.element_size() for s in moments for v in s.values())
    player = state.method.players["student"].parameters.values()
    assert said.turns["student"].gradients == sum(p.numel() * p.element_size() for p in player)
    assert said.averages["ema"] == sum(4 * p.numel() for p in player)
    whole = measured(load(find(Path("emoji32/consistency")), [*words[:2], "train.precision=bf16"]))
    assert 0.5 < said.parameters["student"] / whole.parameters["student"] < 0.6
    assert said.turns["student"].activations < whole.turns["student"].activations
