"""From a pipeline folder and captioned pictures to training without its VAE and text encoders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.commands.train import logged, start
from fewstep.config_file import parse
from fewstep.data.cached import CachedLatents
from fewstep.data.loader import Loader
from fewstep.data.sources import open_dataset
from fewstep.errors import RunError
from fewstep.models.encoder import open_encoder
from fewstep.models.load import load_denoiser
from tests import tiny_pipelines
from tests.cli.lab import Outcome, call, write_images
from tests.tiny_pipelines import SIDE, saved

TEXT = ("sd15", "sdxl", "pixart", "sd3", "flux", "flux_guidance", "sana", "lumina2", "zimage", "flux2_klein")


def cached(teacher: Path, out: Path, *words: str, count: int = 6) -> Outcome:
    data = ["--data", "emoji", "--size", str(SIDE), "--samples", str(count)]
    return call("cache", str(teacher), str(out), *data, "--batch", "2", "--shard-size", "4", *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny SD1.5 pipeline and a cache by it."""
    root = tmp_path_factory.mktemp("cached")
    teacher = saved("sd15", root)
    outcome = cached(teacher, root / "cache")
    assert outcome.code == 0, outcome.err
    return teacher, root / "cache"


def values(folder: Path, teacher: Path, cache: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(teacher), "guidance": 3.0},
        "method": {"name": "dmd2", "critic_updates": 2},
        "data": {"name": "cache", "path": str(cache), "batch_size": 2},
        "train": {"steps": 3, "threads": 1, "sample_every": 0, "log_every": 1, "checkpoint_every": 1},
    }


def trained(folder: Path, run: dict[str, Any], *words: str) -> Outcome:
    (folder / "run.yaml").write_text(json.dumps(run))
    return call("train", str(folder / "run.yaml"), *words)


def student(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"step-{step:08d}" / "player-student.safetensors")


@pytest.mark.usefixtures("fresh_accelerate")
def test_training_opens_neither_vae_nor_text_encoder(made, tmp_path, monkeypatch):
    """The run on a folder that has neither, where whoever opens one fails, is the run on the whole folder."""
    teacher, cache = made
    bare = Path(shutil.copytree(teacher, tmp_path / "bare"))
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(bare / part)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert trained(tmp_path / "one", values(tmp_path / "one", teacher, cache)).code == 0
    for name in ("transformers.CLIPTextModel", "transformers.CLIPTokenizer", "diffusers.AutoencoderKL"):
        monkeypatch.setattr(f"{name}.from_pretrained", lambda *args, **kwargs: pytest.fail("opened"))
    outcome = trained(tmp_path / "two", values(tmp_path / "two", bare, cache), "data.workers=1")
    assert outcome.code == 0, outcome.err
    one, two, first = student(tmp_path / "one"), student(tmp_path / "two"), load_denoiser(str(teacher)).parameters()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert any(not torch.equal(one[key], value) for key, value in first.items())
    assert all(bool(value.isfinite().all()) for value in one.values())


@pytest.mark.usefixtures("fresh_accelerate")
def test_prompts_train_methods_that_need_no_pixels(made, tmp_path):
    teacher, _ = made
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog on a hill\nan owl\n")
    prompts = ["--data", "prompts", "--path", str(tmp_path / "prompts.txt"), "--size", str(SIDE)]
    assert call("cache", str(teacher), str(tmp_path / "cache"), *prompts).code == 0
    run = values(tmp_path, teacher, tmp_path / "cache")
    assert trained(tmp_path, run).code == 0
    assert all(bool(value.isfinite().all()) for value in student(tmp_path).values())
    run["method"] = {"name": "consistency"}
    run["run"]["dir"] = str(tmp_path / "pixels")
    outcome = trained(tmp_path, run, "train.max_bad_steps=2")
    assert (outcome.code, "the gradient of student has not been finite for" in outcome.err) == (1, True)


def run_of(made: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    run = values(folder, *made)
    run["teacher"].pop("guidance")
    return run


def test_a_set_without_embeddings_is_refused_for_a_teacher_of_prompts(made, tmp_path):
    run = run_of(made, tmp_path)
    run["data"] = {"name": "folder", "path": str(write_images(tmp_path / "set", size=SIDE)), "size": SIDE}
    outcome = trained(tmp_path, run)
    assert outcome.code == 2
    assert "data.name: the teacher is told prompts, and the data set has class labels and no captions" in outcome.err
    outcome = trained(tmp_path, run, "data={name: digits, path: null, size: null}", "train.steps=1")
    assert "told prompts, and the data set has class labels and no captions; give captioned" in outcome.err


def test_a_cache_of_another_teacher_is_refused(made, tmp_path):
    _, cache = made
    run = run_of(made, tmp_path)
    other = edited(saved("sd15", tmp_path), "text_encoder", num_hidden_layers=4)
    outcome = trained(tmp_path, run, f"teacher.path={other}")
    assert outcome.code == 2
    assert f"data.path: {cache} was made by {made[0]}, whose VAE and text encoders are not those of the" in outcome.err


def test_a_cache_of_another_checkpoint_is_refused(made, tmp_path):
    """Of the same architecture: the configs are equal, a number of one text encoder is not."""
    other = Path(shutil.copytree(made[0], tmp_path / "other"))
    weights = load_file(other / "text_encoder" / "model.safetensors")
    next(value for key, value in weights.items() if key.endswith("q_proj.weight")).view(-1)[0] += 1e-3
    save_file(weights, other / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    outcome = trained(tmp_path, run_of(made, tmp_path), f"teacher.path={other}")
    told = f"was made by {made[0]}, whose text_encoder has other weights than that of the teacher in {other}; make one"
    assert (outcome.code, told in outcome.err) == (2, True), outcome.err
    assert outcome.err.count("\n") == 1
    again = Path(shutil.copytree(made[1], tmp_path / "again"))
    (again / "index.json").unlink()
    outcome = cached(other, again)
    assert outcome.code == 2
    assert "text_encoder" not in outcome.out


def edited(teacher: Path, part: str, **changes: object) -> Path:
    path = teacher / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return teacher


@pytest.mark.parametrize(
    ("unet", "line"),
    [
        ({"cross_attention_dim": 16}, "its encoder_hidden_states are 32 wide, the teacher takes 16; make one with its"),
        ({"in_channels": 8, "out_channels": 8}, "data.name: samples have 4 channels, the teacher takes 8"),
    ],
)
def test_a_network_alone_that_does_not_fit_is_refused(made, tmp_path, unet, line):
    pipeline = tiny_pipelines.settled(lambda: tiny_pipelines.sd15(**unet))
    pipeline.save_pretrained(tmp_path / "other")
    for part in ("vae", "text_encoder"):
        shutil.rmtree(tmp_path / "other" / part)
    outcome = trained(tmp_path, run_of(made, tmp_path), f"teacher.path={tmp_path / 'other'}")
    assert (outcome.code, line in outcome.err) == (2, True), outcome.err


def test_saving_a_pipeline_again_is_no_other_teacher(made, tmp_path):
    again = edited(
        Path(shutil.copytree(made[0], tmp_path / "again")), "vae", _diffusers_version="99", _name_or_path="x"
    )
    outcome = trained(tmp_path, run_of(made, tmp_path), f"teacher.path={again}", "train.steps=1")
    assert outcome.code == 0, outcome.err


def test_prompts_are_refused_for_a_teacher_of_classes(made, tmp_path):
    dit = saved("dit", tmp_path)
    outcome = trained(tmp_path, run_of(made, tmp_path), f"teacher.path={dit}")
    assert (outcome.code, "holds prompts, and the teacher takes class labels" in outcome.err) == (2, True), outcome.err


def test_size_and_damage_are_found_before_the_first_step(made, tmp_path):
    run = run_of(made, tmp_path)
    outcome = trained(tmp_path, run, "data.size=64")
    assert (outcome.code, f"data.size: 64 given, the cache in {made[1]} is of images of {SIDE}" in outcome.err) == (
        2,
        True,
    )
    copy = Path(shutil.copytree(made[1], tmp_path / "cache"))
    (copy / "shard-00001.safetensors").unlink()
    outcome = trained(tmp_path, run, f"data.path={copy}")
    assert outcome.code == 2
    assert f"{copy / 'shard-00001.safetensors'} is missing; make it anew: fewstep cache {made[0]} {copy}" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_shards_that_vanish_in_mid_run(made, tmp_path, workers):
    """The run ends with its checkpoint named, and where they are back, goes on as if nothing had been."""
    cache = Path(shutil.copytree(made[1], tmp_path / "cache"))
    (tmp_path / "straight").mkdir()
    assert trained(tmp_path / "straight", values(tmp_path / "straight", made[0], cache), "train.steps=6").code == 0
    run = values(tmp_path, made[0], cache)
    run["data"]["workers"] = workers
    run["train"]["steps"] = 6
    reports = logged(start(parse(run)))
    next(reports)
    cache.rename(tmp_path / "away")
    with pytest.raises(RunError) as caught:
        list(reports)
    told = str(caught.value)
    assert ".safetensors' cannot be read any more (No such file or directory); put it back; the same command" in told
    (tmp_path / "away").rename(cache)
    outcome = trained(tmp_path, run)
    assert "resumed from" in outcome.out, outcome.err
    one, two = student(tmp_path / "straight", 6), student(tmp_path, 6)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.slow
def test_two_launched_processes_make_the_bytes_of_one(made, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0", "-m", "fewstep"]  # fmt: skip
    words = ["--data", "emoji", "--size", str(SIDE), "--samples", "6", "--batch", "2", "--shard-size", "4"]
    done = subprocess.run([*launch, "cache", str(made[0]), str(tmp_path / "two"), *words], env=os.environ, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote 6 samples in 2 shards") == 1
    for path in made[1].iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("name", TEXT)
def test_every_family_hears_from_the_cache_what_its_pipeline_says(tmp_path, name):
    teacher = saved(name, tmp_path)
    outcome = cached(teacher, tmp_path / "cache")
    assert outcome.code == 0, outcome.err
    data, encoder = CachedLatents(tmp_path / "cache"), open_encoder(str(teacher), side=SIDE)
    plain = open_dataset("emoji", size=SIDE).batch(range(6))
    assert plain.captions is not None
    assert torch.allclose(data.batch(range(6)).images, encoder.latents(plain.images), atol=1e-5)
    network = load_denoiser(str(teacher))
    order: Sequence[int] = (5, 0)
    (batch,) = (next(iter(Loader(_Of(data, order), 2, seed=0))),)
    told = encoder.prompts([plain.captions[i] for i in order])
    x, t = batch.x, torch.full((2,), 0.5 if name not in ("sd15", "sdxl", "pixart") else 500.0)
    with torch.no_grad():
        theirs, ours = network(x, t, told).value, network(x, t, batch.condition).value
    assert torch.allclose(theirs, ours, atol=1e-5), float((theirs - ours).abs().max())
    assert data.null is not None
    with torch.no_grad():
        theirs, ours = (network(x, t, null.expand(2)).value for null in (encoder.null(), data.null))
    assert torch.allclose(theirs, ours, atol=1e-5), float((theirs - ours).abs().max())


class _Of:
    """The samples of a set at some indices, without end."""

    length, classes = None, ()

    def __init__(self, data: CachedLatents, order: Sequence[int]) -> None:
        self._data, self._order, self.shape = data, order, data.shape

    def batch(self, indices: Sequence[int]) -> Any:
        return self._data.batch([self._order[i % len(self._order)] for i in indices])
