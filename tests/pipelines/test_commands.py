"""`fewstep export`, `sample` and `pairs` on a small run of digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.commands.source import open_source
from fewstep.config import RunConfig, parse
from fewstep.data.pairs import load_pairs
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.guidance import Guided
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.pipelines import check
from fewstep.pipelines.card import CardFacts
from fewstep.pipelines.export import export_student
from fewstep.pipelines.manifest import read_manifest
from fewstep.training import checkpoint
from fewstep.training.assemble import EMA, assemble, make_accelerator, open_sources
from fewstep.training.finished import load_run
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
        source.images(source.sampler, noise, labels, 1)
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
