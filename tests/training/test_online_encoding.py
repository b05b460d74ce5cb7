"""Text-to-image runs that encode their pictures and captions themselves, and that show samples while they train."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.commands import preview
from fewstep.commands.preview import COLUMNS, Preview
from fewstep.commands.train import logged
from fewstep.config import RunConfig
from fewstep.config_file import parse
from fewstep.data.encoding import Encoded
from fewstep.data.loader import Loader
from fewstep.data.sources import open_dataset
from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.evaluation.features import to_uint8
from fewstep.models.encoder import Encoder, open_encoder
from fewstep.models.guidance import Guided
from fewstep.models.load import load_denoiser
from fewstep.training.assemble import EMA
from fewstep.training.loop import TrainState
from fewstep.training.opening import open_sources
from tests.cli.lab import Outcome, call
from tests.data.cache_lab import CAPTIONS, pictures
from tests.tiny_pipelines import PIPELINES, facts, saved
from tests.tiny_pipelines import SIDE as LARGE
from tests.training.ranks import begin_rank, launch
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, with_sections

SIDE = 16
TEXT = [name for name in PIPELINES if name not in ("ddpm", "dit")]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD1.5 and seven captioned pictures."""
    root = tmp_path_factory.mktemp("online")
    saved("sd15", root)
    pictures(root / "set", side=SIDE)
    return root


def values(place: Path, folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run that works, in three steps; each section takes what is told over these settings."""
    out: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(place / "sd15"), "guidance": 3.0},
        "student": {"lora": 2},
        "method": {"name": "dmd2", "critic_updates": 2, "fake_score_lora": 2},
        "data": {"name": "captions", "path": str(place / "set"), "size": SIDE, "batch_size": 2},
        "optim": {"lr": 1e-2},
        "train": {"steps": 3, "sample_every": 0, "log_every": 1, "checkpoint_every": 1, "trackers": []},
        "health": {"every": 0},
    }
    return with_sections(out, sections)


def run_of(place: Path, folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    return parse(values(place, folder, **sections))


def begun(run: RunConfig) -> TrainState:
    return begin(run, open_sources(run))


def finished(run: RunConfig, state: TrainState | None = None) -> dict[str, Tensor]:
    """Everything at the end of a run, with what a run writes."""
    made = state or begun(run)
    for _ in logged(made):
        pass
    return everything(made)


def trained(folder: Path, run: dict[str, Any], *words: str) -> Outcome:
    (folder / "run.yaml").write_text(json.dumps(run))
    return call("train", str(folder / "run.yaml"), *words)


def cache_of(place: Path, out: Path) -> Path:
    words = ["--data", "captions", "--path", str(place / "set"), "--size", str(SIDE), "--batch", "1"]
    outcome = call("cache", str(place / "sd15"), str(out), *words)
    assert outcome.code == 0, outcome.err
    return out


@pytest.mark.slow
def test_a_killed_run_of_drawn_latents_goes_on_to_the_same_bits(place, tmp_path):
    """With grids, workers, micro-batches and a VAE and text encoder that rest on the host; straight, with none."""
    sections = {"data": {"latents": "drawn", "batch_size": 4}, "train": {"accumulate": 2}}
    straight = finished(run_of(place, tmp_path / "straight", **sections))
    sections = {"data": {**sections["data"], "workers": 1}, "memory": {"encoders": "host"},
                "train": {**sections["train"], "sample_every": 2, "sample_prompts": ["an owl", ""]}}  # fmt: skip
    cut = values(place, tmp_path, **sections)
    for report in logged(begun(parse(cut))):
        if report.step == 2:
            break
    outcome = trained(tmp_path, cut)
    assert "resumed from" in outcome.out, outcome.err
    players = {name: load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / f"player-{name}.safetensors")
               for name in ("student", "fake_score")}  # fmt: skip
    for name, weights in players.items():
        assert [key for key, value in weights.items() if not torch.equal(value, straight[f"{name}/{key}"])] == []
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000003.png",
    ]


@pytest.mark.slow
def test_a_run_that_encodes_is_the_run_on_a_cache(place, tmp_path):
    """To rounding: in batches of another size the encoders add in another order."""
    online = finished(run_of(place, tmp_path / "online"))
    data = {"name": "cache", "path": str(cache_of(place, tmp_path / "cache")), "size": None}
    cached = finished(run_of(place, tmp_path / "cached", data=data))
    assert online.keys() == cached.keys()
    for key, value in online.items():
        if "adam" not in key:
            torch.testing.assert_close(value, cached[key], rtol=1e-3, atol=1e-4)
    start = open_sources(run_of(place, tmp_path)).dataset, open_sources(run_of(place, tmp_path, data=data)).dataset
    for one, other in zip(*(islice(Loader(of, 1, seed=0), 7) for of in start), strict=True):
        assert torch.equal(one.x, other.x)
        assert one.condition.batched.keys() == other.condition.batched.keys()
        for key, value in one.condition.batched.items():
            assert torch.equal(value, other.condition.batched[key]), key


def png(path: Path) -> Tensor:
    """`(H, W, 3)`."""
    import numpy as np

    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())


@pytest.mark.slow
def test_a_grid_shows_what_the_teacher_s_vae_makes_of_the_student(place, tmp_path):
    """Each sample by itself, of the averaged weights: found in the picture, pixel for pixel."""
    run = run_of(place, tmp_path, train={"sample_every": 1, "steps": 1})
    state = begun(run)
    for _ in logged(state):
        pass
    shown = png(tmp_path / "run" / "samples" / "step-00000001.png")
    encoder, student = open_encoder(str(place / "sd15"), side=SIDE), state.method.student
    sampler: Sampler = type(state.method).sampler(run.method, student.process, 1)
    with torch.no_grad(), state.method.averages[EMA].swapped():
        for row, caption in enumerate(CAPTIONS[:2]):
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            generator = torch.Generator().manual_seed(1)
            made = encoder.images(sample(student, sampler, noise, encoder.prompts([caption]), generator))
            tile = to_uint8(made)[0].permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1)
            assert tile.float().std() > 1
            found = shown.unfold(0, 3 * SIDE, 1).unfold(1, 3 * SIDE, 1)  # (y, x, 3, H, W)
            hits = (found == tile.permute(2, 0, 1)).flatten(2).all(-1).nonzero()
            assert len(hits) == CAPTIONS[:4].count(caption)
            assert row * 3 * SIDE < hits[0, 0] < (row + 1) * 3.5 * SIDE


@pytest.mark.slow
def test_grids_of_a_cache_open_the_vae_alone_and_change_nothing(place, tmp_path, monkeypatch):
    data = {"name": "cache", "path": str(cache_of(place, tmp_path / "cache")), "size": None}
    plain = finished(run_of(place, tmp_path / "plain", data=data))
    for name in ("transformers.CLIPTextModel", "transformers.CLIPTokenizer"):
        monkeypatch.setattr(f"{name}.from_pretrained", lambda *_, **__: pytest.fail("opened"))
    words: dict[str, Any] = {"data": data, "train": {"sample_every": 1}, "memory": {"encoders": "host"}}
    run = run_of(place, tmp_path / "shown", **words)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = begun(run)
    assert_same(plain, finished(run, state))
    assert torch.equal(before, torch.get_rng_state())
    sizes = [png(path).shape for path in sorted((tmp_path / "shown" / "run" / "samples").iterdir())]
    assert len(sizes) == 3
    assert sizes[0][1] >= COLUMNS * 3 * SIDE


@pytest.mark.slow
def test_the_dry_run_of_a_run_that_encodes(place, tmp_path):
    outcome = trained(tmp_path, values(place, tmp_path), "--dry-run")
    assert (outcome.code, "turn critic: trains fake_score" in outcome.out) == (0, True), outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_samples_and_exports_of_a_run_that_encodes(place, tmp_path):
    assert trained(tmp_path, values(place, tmp_path)).code == 0
    for name, words in (("one", []), ("two", ["--encoders", "host"])):
        out = ["--prompt", "a red fish", "--out", str(tmp_path / f"{name}.png"), "--seed", "0"]
        outcome = call("sample", str(tmp_path / "run"), *out, *words)
        assert outcome.code == 0, outcome.err
    assert torch.equal(png(tmp_path / "one.png"), png(tmp_path / "two.png"))
    assert call("export", str(tmp_path / "run"), str(tmp_path / "out"), "--no-verify").code == 0
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").is_file()
    outcome = call("sample", str(tmp_path / "run"), *out, "--device", "cudo")
    assert outcome.code == 2
    assert outcome.err.startswith("error: --device: 'cudo' cannot be used (")
    assert outcome.err.endswith("; cpu always can\n")


def bare(place: Path, folder: Path) -> str:
    """The teacher without VAE and text encoder."""
    copy = Path(shutil.copytree(place / "sd15", folder / "bare"))
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(copy / part)
    return f"teacher.path={copy}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.size=21", "data.options={allow_upscale: true}"], "data.size: 21 pixels given; AutoencoderKL here"),
        (["train.sample_prompts=[a cat]"], "train.sample_prompts: ['a cat'] given; it does nothing without sample_ev"),
        (["data.latents=posterior"], "data.latents: must be 'mode' or 'drawn'; found 'posterior'"),
    ],
)
def test_what_a_run_that_encodes_is_refused_for(place, tmp_path, words, line):
    run = values(place, tmp_path)
    outcome = trained(tmp_path, run, *words)
    assert (outcome.code, line in outcome.err.replace("('a cat',)", "['a cat']")) == (2, True), outcome.err
    assert not (tmp_path / "run").exists()


def test_text_encoders_that_told_the_prompts_of_grids_are_gone(place, monkeypatch):
    """Though they rested, which leaves cycles."""
    opened: list[weakref.ref[Any]] = []

    def noted(*args: Any, **words: Any) -> Encoder:
        made = open_encoder(*args, **words)
        opened.append(weakref.ref(made.capture.pipeline.text_encoder))
        return made

    monkeypatch.setattr(preview, "open_encoder", noted)
    monkeypatch.setattr(preview, "pipeline_of", lambda *_: str(place / "sd15"))
    config = SimpleNamespace(memory=SimpleNamespace(encoders="host"))
    state: Any = SimpleNamespace(config=config, accelerator=SimpleNamespace(device=torch.device("cpu")))
    data: Any = SimpleNamespace(index=SimpleNamespace(plan=SimpleNamespace(size=SIDE)))
    assert len(preview._told(state, data, ["an owl", ""]).batched["encoder_hidden_states"]) == 2
    assert [one() for one in opened] == [None]


def test_draws_need_a_vae_with_a_posterior(place, tmp_path, monkeypatch):
    encode: Any = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x, return_dict: (encode(vae, x).latent_dist.mode(),))
    open_sources(run_of(place, tmp_path))
    with pytest.raises(UserError, match=r"data\.latents: drawn given, but the VAE in .*sd15 has one latent for an"):
        open_sources(run_of(place, tmp_path, data={"latents": "drawn"}))


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"memory": {"encoders": "host"}}, "memory.encoders: host given, but this run encodes and decodes nothing"),
        (
            {"train": {"sample_every": 1, "sample_prompts": ["a cat"]}},
            "train.sample_prompts: given, but the run's stud",
        ),
    ],
)
def test_settings_that_do_nothing_for_a_run_of_vectors(tmp_path, sections, line):
    with pytest.raises(UserError, match=line):
        Preview.of(begin(config(METHODS["pretrain"], tmp_path, **sections)))


@pytest.mark.slow
def test_latents_that_nothing_shows(place, tmp_path):
    cache = cache_of(place, tmp_path / "cache")
    data = {"name": "cache", "path": str(cache), "size": None}
    run = values(place, tmp_path, data=data, train={"sample_every": 1})
    outcome = trained(tmp_path, run, bare(place, tmp_path))
    told = "train.sample_every: 1 given, but nothing shows the run's latents ("
    assert (outcome.code, told in outcome.err) == (2, True), outcome.err
    assert "no vae; latents and images need one); set it to 0" in outcome.err
    outcome = trained(tmp_path, run, "data.latents=drawn")
    told = "data.latents: drawn given, but a run of this teacher on data.name=cache encodes no pictures; leave it out"
    assert (outcome.code, told in outcome.err) == (2, True), outcome.err
    outcome = trained(tmp_path, run, "train.sample_every=0", "memory.encoders=host")
    assert (outcome.code, "memory.encoders: host given, but this run encodes" in outcome.err) == (2, True), outcome.err


def _rank(run: RunConfig, folder: Path) -> None:
    state = begin_rank(run, open_sources(run))
    go(state)
    if state.accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in everything(state).items()}, folder / "end.safetensors")


@pytest.mark.slow
def test_two_processes_encode_what_one_does(place, tmp_path):
    sections: dict[str, Any] = {"data": {"batch_size": 4, "latents": "drawn"}, "optim": {"lr": 1e-3}}
    run = run_of(place, tmp_path, **sections, train={"accumulate": 2})
    assert launch(partial(_rank, run), tmp_path / "two") == [0, 0]
    alone = begun(run)
    go(alone)
    expected, shared = everything(alone), load_file(tmp_path / "two" / "end.safetensors")
    for key in expected:
        if key.startswith(("student/", "fake_score/")) and "exp_avg" not in key:
            torch.testing.assert_close(shared[key], expected[key], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("name", TEXT)
def test_every_family_is_told_what_its_pipeline_says(tmp_path, name):
    """Whatever is padded: the network hears the same, under guidance too."""
    folder = saved(name, tmp_path)
    encoder = open_encoder(str(folder), side=LARGE, call=facts(name))
    plain, network = open_dataset("emoji", size=LARGE), load_denoiser(str(folder))
    online = Encoded.of(plain, encoder, True, None, 2)
    assert online.null is not None
    batch = next(iter(Loader(online, 3, seed=0)))
    captions = plain.batch(range(3)).captions
    assert captions is not None
    told = [encoder.prompts([caption]) for caption in captions]
    t = torch.full((1,), 0.5 if isinstance(network.process, Flow) else 500.0)
    with torch.no_grad():
        both = Guided(network, online.null, 2.0)(batch.x, t.expand(3), batch.condition).value
        for i, condition in enumerate(told):
            theirs = network(batch.x[i : i + 1], t, condition).value
            ours = network(batch.x[i : i + 1], t, batch.condition.rows(slice(i, i + 1))).value
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            unconditional = network(batch.x[i : i + 1], t, encoder.null()).value
            torch.testing.assert_close(both[i : i + 1], 2 * theirs - unconditional, rtol=0, atol=1e-4)
