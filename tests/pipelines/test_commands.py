"""`fewstep export`, `sample` and `pairs` on a small run of digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.commands.pictures import sample_grid
from fewstep.commands.source import open_source
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.data.pairs import load_pairs
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import RunError, UserError
from fewstep.models.conditioning import Condition
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import with_guidance, with_guidance_input
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.pipelines import check
from fewstep.pipelines.card import CardFacts
from fewstep.pipelines.export import export_student
from fewstep.pipelines.manifest import read_manifest
from fewstep.training import checkpoint
from fewstep.training.assemble import EMA, assemble, make_accelerator
from fewstep.training.finished import load_run
from fewstep.training.opening import open_sources
from tests import tiny

pytest.importorskip("sklearn", reason="digits come with scikit-learn")
# The own grid of DPMSolverMultistepScheduler turns a tensor into an array in a way that NumPy 2 warns of.
pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture
def teacher(tmp_path, cosine) -> Path:
    """A pipeline folder: ten digits of one channel."""
    network = tiny.alive(tiny.unet2d_classes(classes=10, channels=1))
    denoiser = make_denoiser(network, Schedule(cosine, Kind.V))
    facts = CardFacts("pretrain", "Ho et al. 2020", license="apache-2.0")
    export_student(denoiser, Sampler.of(cosine, 32, "ddim"), None, tmp_path / "teacher", facts)
    return tmp_path / "teacher"


def config_of(folder: Path, teacher: Path | None, **sections: object) -> RunConfig:
    values = {
        "run": {"dir": str(folder), "seed": 0},
        "teacher": {"path": str(teacher), "guidance": 2.0} if teacher else {},
        "method": {"name": "consistency", "target": "self"},
        "data": {"name": "digits", "batch_size": 4},
        "student": {"steps": 2},
    }
    return parse({**values, **sections})


def saved(config: RunConfig) -> torch.Tensor:
    """A run with a checkpoint whose averaged weights are its student's plus 0.01; one of the averages."""
    state = assemble(config, open_sources(config), make_accelerator(config))
    shadow = state.method.averages[EMA].shadow
    for tensor in shadow.values():
        tensor += 0.01
    checkpoint.save(config.run.dir / "checkpoints", state)
    (config.run.dir / "config.json").write_text(config.model_dump_json())
    return next(iter(shadow.values()))


@pytest.fixture
def run(tmp_path, teacher) -> Path:
    saved(config_of(tmp_path / "run", teacher))
    return tmp_path / "run"


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("lora", [None, 2])
def test_a_run_opens_with_its_averaged_weights(tmp_path, teacher, lora):
    config = config_of(tmp_path / "run", teacher, student={"steps": 2, "lora": lora})
    expected = saved(config)
    finished = load_run(tmp_path / "run")
    assert torch.equal(next(iter(finished.student.parameters().values())), expected)
    assert (finished.sampler, finished.step) == (Sampler((999.0, 499.0)), 0)
    assert finished.few_step
    assert len(finished.classes) == 10


def test_a_teacher_from_scratch_is_no_few_step_student(tmp_path):
    new = {"config": {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "norm_num_groups": 4,
                      "up_block_types": ["UpBlock2D"], "layers_per_block": 1, "add_attention": False}}  # fmt: skip
    config = config_of(tmp_path / "run", None, method={"name": "pretrain"}, student={"new": new})
    saved(config)
    finished = load_run(tmp_path / "run")
    assert (len(finished.sampler.times), finished.sampler.kind, finished.few_step) == (32, "ddim", False)
    assert open_source(str(tmp_path / "run"), guidance=3.0).few_step is False


def test_folders_that_are_no_runs_are_told(tmp_path, teacher):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_run(tmp_path)
    config = config_of(tmp_path / "run", teacher)
    config.run.dir.mkdir()
    (config.run.dir / "config.json").write_text(config.model_dump_json())
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(tmp_path / "run")
    (config.run.dir / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_run(tmp_path / "run")


def test_export_writes_and_checks(tmp_path, run):
    told = invoke("export", run, tmp_path / "out")
    assert "samples differ by at most" in told
    manifest = read_manifest(tmp_path / "out")
    assert manifest.config == load_run(run).config.model_dump(mode="json")
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert "not checked" in invoke("export", run, tmp_path / "out", "--no-verify")


def test_an_export_that_differs_ends_with_code_1(tmp_path, run, monkeypatch):
    monkeypatch.setattr(check, "difference", lambda *_: 0.25)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "differ by up to 0.25, allowed is 1e-05" in done.output
    assert (tmp_path / "out" / "model_index.json").is_file()


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError | RunError), done.output
    return str(done.exception)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora"], "--lora: this run trained all weights (student.lora is null), so there are no adapters to write"),
        (["--max-shard-size", "big"], "--max-shard-size: 'big' given; a number and KB, MB, GB or TB are needed"),
        (
            ["--metrics", "nowhere.json"],
            "--metrics: nowhere.json is no JSON file; `fewstep evaluate --json` writes one",
        ),
        (["--push-to-hub", "no name"], "--push-to-hub: 'no name' is no name of a repository; write owner/name"),
        (["--push-to-hub", "alone"], "--push-to-hub: 'alone' given; write owner/name"),
    ],
)
def test_options_that_cannot_be_met_write_nothing(tmp_path, run, words, line):
    assert line in refused("export", run, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_the_run_s_own_teacher_is_not_replaced(tmp_path, run, teacher):
    """Though it is an export: the run could not go on."""
    before = (teacher / "fewstep.json").read_bytes()
    line = refused("export", run, tmp_path / "run" / ".." / "teacher", "--no-verify")
    assert line.endswith("teacher is the run's teacher.path; give a new folder")
    assert (teacher / "fewstep.json").read_bytes() == before


def test_weights_leave_in_shards_and_figures_in_the_card(tmp_path, run):
    (tmp_path / "figures.json").write_text(
        json.dumps({"fd": {"value": 12.5}, "samples": 100, "features": "classifier"})
    )
    invoke("export", run, tmp_path / "out", "--max-shard-size", "20KB", "--metrics", tmp_path / "figures.json")
    shards = list((tmp_path / "out" / "unet").glob("diffusion_pytorch_model-*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) < 40_000
    assert "| fd value | 12.5 |" in (tmp_path / "out" / "README.md").read_text().splitlines()


@pytest.mark.parametrize("lora", [None, 2])
def test_rounded_weights_are_checked_against_rounded_ones(tmp_path, teacher, lora):
    saved(config_of(tmp_path / "run", teacher, student={"steps": 2, "lora": lora}))
    assert "samples differ by at most" in invoke("export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_an_upload_that_fails_leaves_the_export(tmp_path, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("export", run, tmp_path / "out", "--no-verify", "--push-to-hub", "someone/few-digits")
    assert line.startswith(f"--push-to-hub: someone/few-digits was not uploaded, {tmp_path / 'out'} is whole: ")
    assert "\n" not in line
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_an_upload_takes_the_whole_folder(tmp_path, run, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **words: f"https://hub/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **words: calls.append(words))
    told = invoke("export", run, tmp_path / "out", "--no-verify", "--push-to-hub", "someone/few-digits")
    assert "uploaded to https://hub/someone/few-digits" in told
    assert [(one["repo_id"], one["folder_path"]) for one in calls] == [("someone/few-digits", tmp_path / "out")]


def test_sample_draws_a_row_a_step_count(tmp_path, run, teacher):
    told = invoke("sample", run, "--out", tmp_path / "a.png", "--steps", 1, "--steps", 2, "--classes", 3)
    assert [line.split(":")[0] for line in told.splitlines()[:2]] == ["1 step", "2 steps"]
    told = invoke("sample", teacher, "--out", tmp_path / "b.png", "--guidance", 2)
    assert [line.split(":")[0] for line in told.splitlines()[:4]] == ["1 step", "2 steps", "4 steps", "32 steps"]
    with Image.open(tmp_path / "a.png") as few, Image.open(tmp_path / "b.png") as many:
        assert few.height < many.height
        assert few.width < many.width


def test_an_export_samples_as_its_run(tmp_path, run):
    invoke("export", run, tmp_path / "out", "--no-verify")
    labels = torch.tensor([3, 7])
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = [
        source.images(source.sampler, noise, Condition.of_labels(labels), 1)
        for source in map(open_source, (str(run), str(tmp_path / "out")))
    ]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-5)
    assert made[0].std() > 1e-2


def test_what_cannot_be_sampled_is_told(tmp_path, run, teachers):
    with pytest.raises(UserError, match="few-step student has it built in"):
        open_source(str(run), guidance=2.0)
    with pytest.raises(UserError, match="makes latents"):
        open_source(str(teachers("dit").folder))
    source = open_source(str(run))
    assert source.class_number(source.classes[4]) == 4
    with pytest.raises(UserError, match=r"'10' given.* or 0 to 9 are allowed"):
        source.class_number("10")


RANGED = {"name": "consistency", "target": "self", "guidance_range": [2.0, 6.0]}


@pytest.fixture
def scaled_run(tmp_path, teacher) -> Path:
    """A run whose student takes scales from 2 to 6, and hears them."""
    config = config_of(tmp_path / "scaled", teacher, method=RANGED)
    state = assemble(config, open_sources(config), make_accelerator(config))
    for name, tensor in state.method.averages[EMA].shadow.items():
        tensor += 0.3 * torch.randn(tensor.shape) if ".second.guidance." in name else 0.01
    checkpoint.save(config.run.dir / "checkpoints", state)
    (config.run.dir / "config.json").write_text(config.model_dump_json())
    return config.run.dir


def test_a_student_with_a_range_is_sampled_at_the_scale_asked_for(tmp_path, scaled_run):
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    made = {}
    for scale in (None, 2.0, 4.0, 6.0):
        source = open_source(str(scaled_run), scale)
        made[scale] = source.images(source.sampler, noise, Condition.of_labels(labels), 1)
    assert torch.equal(made[None], made[4.0]), "the middle of its range"
    assert float((made[2.0] - made[6.0]).abs().max()) > 1e-3
    assert "wrote" in invoke("sample", scaled_run, "--out", tmp_path / "a.png", "--guidance", 3)
    with pytest.raises(UserError, match=r"guidance: 7 given; .* scales from 2 to 6"):
        open_source(str(scaled_run), 7.0)


def test_the_grids_of_training_are_made_in_the_middle(tmp_path, teacher):
    config = config_of(tmp_path / "run", teacher, method=RANGED)
    state = assemble(config, open_sources(config), make_accelerator(config))
    told = set()
    heard = state.method.student.network.get_submodule("time_embedding.second.guidance")
    heard.register_forward_pre_hook(lambda _, words: told.update(words[0].tolist()))
    sample_grid(state, tmp_path / "grid.png", rows=1)
    assert told == {4.0}


def test_an_added_input_leaves_in_a_network_of_ours(tmp_path, scaled_run):
    told = invoke("export", scaled_run, tmp_path / "out")
    assert "loads where fewstep is installed and imported, for its FewStepUNet2DModel" in told
    assert "reloaded in a fresh process, samples differ by at most" in told
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    student = load_run(scaled_run).student
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    for scale in (None, 2.0, 6.0):
        if scale is not None:
            pipeline.unet.guidance_scale = scale
        with torch.no_grad():
            heard = pipeline.unet(noise, torch.tensor(999), class_labels=labels).sample
            condition = with_guidance(Condition.of_labels(labels), torch.full((2,), scale or 4.0), student)
            expected = student(noise, torch.full((2,), 999.0), condition).value
        torch.testing.assert_close(heard, expected, rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match="guidance_scale: 7 given; this network was trained for 2 to 6"):
        pipeline.unet.guidance_scale = 7.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`pipeline.unet.guidance_scale` sets the guidance scale, 4 as it comes." in card
    assert "Loads where fewstep is installed and imported as above, for its `FewStepUNet2DModel`" in card


def test_a_native_input_leaves_at_the_middle_of_its_range(tmp_path, teachers):
    teacher = teachers("sd15")
    student = with_guidance_input(teacher.denoiser, (2.0, 6.0))
    torch.nn.init.normal_(student.parameters()["time_embedding.cond_proj.weight"], std=0.1)
    sampler = Sampler.of(student.process, 2)
    export_student(student, sampler, teacher.folder, tmp_path / "out", CardFacts("consistency", "Luo et al. 2023"))
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.guidance, manifest.call["guidance_scale"]) == (4.0, 4.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Guidance scale: 4\n" in card
    assert "guidance_scale=4.0" in card
    assert check.check(tmp_path / "out", student, sampler) <= check.allowed(student, sampler)


def test_pairs_are_the_guided_teachers(tmp_path, teacher):
    config = config_of(tmp_path / "run", teacher)
    path = tmp_path / "run.yaml"
    path.write_text(config.model_dump_json())
    out = tmp_path / "pairs.safetensors"
    assert "wrote 5 pairs" in invoke("pairs", path, out, "--count", 5, "--solver-steps", 3, "--batch", 2)
    pair = load_pairs(out)
    assert pair.condition.labels is not None
    assert ((pair.condition.labels >= 0) & (pair.condition.labels < 10)).all()
    denoiser = load_denoiser(str(teacher))
    guided = Guided(denoiser, denoiser.null, 2.0)
    with torch.no_grad():
        expected = sample(
            guided, Sampler.of(denoiser.process, 3, "ddim"), pair.noise, Condition(pair.condition.batched)
        )
    torch.testing.assert_close(pair.x0, expected, rtol=0, atol=1e-5)
