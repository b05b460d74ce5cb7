"""Figures of sources that draw what prompts say: the right prompts, the pipeline's own pictures, one result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fewstep.commands import evaluate as command
from fewstep.commands.generate import sample_noise
from fewstep.commands.shards import Team
from fewstep.commands.source import Source, open_any
from fewstep.data.sources import open_dataset
from fewstep.evaluation.features import to_uint8
from fewstep.evaluation.images import real_indices
from tests import tiny
from tests.cli.lab import call, write_teacher
from tests.tiny_features import MEANS, save_clip

ARCH = "fewstep-tiny-prompts"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A cache of the test's own, and shards of a few images."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fewstep.commands.shards.SHARD", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline `sd` that draws 16 × 16 pixels, one of classes `dit`, captioned pictures `real`, weights `clip`."""
    folder = tmp_path_factory.mktemp("prompts")
    pipeline = tiny.sd15_pipeline()
    tiny.alive(pipeline.unet)
    pipeline.save_pretrained(folder / "sd")
    tiny.dit_pipeline().save_pretrained(folder / "dit")
    (folder / "real").mkdir()
    for i in range(16):
        Image.new("RGB", (20, 16), (15 * i, 255 - 9 * i, 40)).save(folder / "real" / f"{i:02d}.png")
        (folder / "real" / f"{i:02d}.txt").write_text(f"a picture of number {i}\n")
    (folder / "list.txt").write_text("a red cat\n\ntwo dogs\na hill\n")
    save_clip(folder, ARCH, 16, shake=0.1)
    return folder


def usual(folder: Path) -> list[str]:
    """Options of most calls."""
    return ["--samples", "12", "--steps", "2", "--reference", f"captions:{folder / 'real'}", "--metrics",
            "fd,kid,cmmd,clip", "--features", f"clip:{ARCH}:{folder}/clip.safetensors"]  # fmt: skip


@pytest.fixture
def figures(folder, tmp_path):
    """What `evaluate` writes about the text pipeline."""

    def measure(*arguments: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        words = ["evaluate", str(folder / "sd"), *usual(folder), "--json", str(out)]
        outcome = call(*words, *arguments)
        assert outcome.code == 0, outcome.err
        told = {key: value for key, value in json.loads(out.read_text()).items() if key != "seconds_per_image"}
        return told | {"printed": outcome.out}

    return measure


def prompts_of(folder: Path, count: int = 12) -> list[str]:
    """The captions of the real pictures that stand on the other side."""
    dataset = open_dataset("captions", path=folder / "real", size=16)
    captions = dataset.batch(real_indices(dataset, count, 0)).captions  # pyright: ignore[reportArgumentType]
    assert captions is not None
    return list(captions)


def by_hand(source: Source, prompt: str, position: int) -> torch.Tensor:
    """What `fewstep sample` draws of a prompt from the noise of a position."""
    noise = sample_noise(source.shape, range(position, position + 1), 0, 0)
    *_, image = source.predictions(source.sampler_in(2), noise, source.of_prompts([prompt]), 0)
    return to_uint8(image)[0]


def clip_of(folder: Path, pictures: list[np.ndarray], captions: list[str]) -> float:
    """By open_clip alone."""
    model: Any = open_clip.create_model(ARCH, pretrained=str(folder / "clip.safetensors")).eval()
    mean, std = np.array(open_clip.OPENAI_DATASET_MEAN), np.array(open_clip.OPENAI_DATASET_STD)
    pixels = torch.from_numpy(np.stack([(one / 255 - mean) / std for one in pictures])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(open_clip.get_tokenizer(ARCH)(captions))
    return float(100 * torch.cosine_similarity(images, texts).clamp(min=0).mean())


def test_every_image_is_drawn_by_and_scored_with_the_caption_of_its_real_one(figures, folder, tmp_path):
    result = figures("--png", str(tmp_path / "png"))
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "png").iterdir())]
    prompts, source = prompts_of(folder), open_any(str(folder / "sd"))
    assert len({*prompts}) == len(pictures) == 12
    for position in (0, 7):
        wanted = by_hand(source, prompts[position], position).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(wanted - pictures[position]).max() <= 1  # rounding tips over in another batch
    assert result["clip"] == pytest.approx(clip_of(folder, pictures, prompts), abs=1e-3)
    assert result["clip"] != pytest.approx(clip_of(folder, pictures, prompts[1:] + prompts[:1]), abs=1e-2)
    assert result["floor"]["clip"] > 0
    assert result["floor_images"] == 4
    assert len(result["prompts_sha256"]) == 64


def test_neither_batch_nor_processes_nor_resting_encoders_move_a_figure(figures, folder, monkeypatch):
    alone = figures("--batch-size", "5", "--encoders", "host")
    other = figures("--batch-size", "3")
    for name in ("fd", "kid", "cmmd", "clip"):
        assert other[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
    sent: list[object] = []

    def gathered(self: Team, mine: list[object]) -> list[object]:
        sent.extend(mine)
        return list(reversed(sent))

    monkeypatch.setattr(Team, "gathered", gathered)
    monkeypatch.setattr(Team, "here", lambda: Team(1, 2))
    assert call("evaluate", str(folder / "sd"), *usual(folder), "--batch-size", "5").out == "", "the first one tells"
    assert len(sent) == 1
    monkeypatch.setattr(Team, "here", lambda: Team(0, 2))
    again = figures("--batch-size", "5", "--no-cache")
    assert without_printed(again) == without_printed(alone)
    assert len(sent) == 3


def without_printed(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "printed"}


def test_a_list_of_prompts_is_drawn_again_and_again(figures, folder, tmp_path):
    listed = ["--prompts", str(folder / "list.txt"), "--features", MEANS, "--samples-dir", str(tmp_path / "made")]
    result = figures(*listed, "--metrics", "fd,diversity", "--png", str(tmp_path / "png"))
    source, prompts = open_any(str(folder / "sd")), ["a red cat", "two dogs", "a hill"]
    image = by_hand(source, prompts[1], 4).permute(1, 2, 0).numpy().astype(int)
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "png").iterdir())]).astype(float)
    assert np.abs(image - pictures[4]).max() <= 1
    means = pictures.mean(axis=(1, 2))
    expected = np.mean([2 * means[i::3].var(axis=0, ddof=1).sum() for i in range(3)])  # of each prompt's four
    assert result["diversity"] == pytest.approx(expected, rel=1e-4)
    assert "diversity" not in result["floor"], "no two real pictures have one caption"
    other, plain = tmp_path / "other.txt", ["--metrics", "fd", "--features", MEANS]
    other.write_text("a red cat\n")
    earlier = tmp_path / "out.json"
    words = ["evaluate", str(folder / "sd"), "--samples", "12", "--steps", "2", *plain, "--prompts", str(other),
             "--reference", f"captions:{folder / 'real'}"]  # fmt: skip
    outcome = call(*words, "--compare", str(earlier))
    assert (outcome.code, "scores: prompts_sha256 is" in outcome.err) == (2, True)
    outcome = call(*words, "--samples-dir", str(tmp_path / "made"))
    assert (outcome.code, "holds samples of another prompts" in outcome.err) == (2, True)


def test_a_pipeline_of_latents_and_classes_is_decoded(folder, tmp_path):
    words = ["--samples", "5", "--steps", "1", "--reference", f"captions:{folder / 'real'}", "--features", MEANS]
    outcome = call("evaluate", str(folder / "dit"), *words, "--metrics", "fd", "--png", str(tmp_path / "png"))
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "png" / "000004.png") as image:
        assert image.size == (16, 16)


@pytest.mark.slow
def test_another_size_is_that_of_the_reference_too(folder, tmp_path):
    words = ["--samples", "3", "--steps", "1", "--reference", "emoji", "--features", MEANS, "--metrics", "fd"]
    outcome = call("evaluate", str(folder / "sd"), *words, "--size", "32", "--png", str(tmp_path / "png"))
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "png" / "000002.png") as image:
        assert image.size == (32, 32)


BAD = [
    ("sd", ["--reference", "{folder}/classes"], "--prompts: missing; the source draws what prompts say"),
    ("sd", ["--prompts", "{folder}/lost.txt"], "--prompts: '{folder}/lost.txt' cannot be read (No such file"),
    ("sd", ["--metrics", "accuracy"], "metrics: accuracy needs classes, and the source takes prompts"),
    ("sd", ["--metrics", "clip"], "metrics: clip needs features that read captions (clip:ARCH:TAG_OR_PATH)"),
    ("sd", ["--metrics", "diversity"], "diversity needs two images of a prompt, and each of the 6 has one of its own"),
    ("sd", ["--reference", "prompts:{folder}/list.txt"], "'prompts:{folder}/list.txt' is no folder; with a"),
    ("sd", ["--reference", "caption:{folder}/real"], "webdataset, huggingface are allowed; did you mean 'cap"),
    ("sd", ["--size", "33"], "33 pixels"),
    ("sd", ["--features", "classifier"], "features 'classifier': trained on 24 classes", "efficientnet-lite0 takes"),
    ("sd", ["--device", "cuda:99"], "--device: 'cuda:99' cannot be used", "cpu always can"),
    ("pixels", ["--prompts", "{folder}/list.txt"], "--prompts: {folder}/list.txt given, but the source takes classes"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", BAD, ids=lambda mistake: " ".join(mistake[1]))
def test_a_mistake_is_one_line_before_anything_is_drawn(folder, monkeypatch, mistake):
    def never(*_: object) -> None:
        raise AssertionError("too late")

    if not (folder / "pixels").exists():
        write_teacher(folder / "pixels", 16, 4)
        (folder / "classes" / "one").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(folder / "classes" / "one" / f"{i}.png")
    monkeypatch.setattr(command, "make_shard", never)
    name, words, *fragments = mistake
    given = [word.format(folder=folder) for word in words]
    plain = ["--samples", "6", "--features", MEANS, "--reference", f"captions:{folder / 'real'}"]
    outcome = call("evaluate", str(folder / name), *plain, *given)
    assert outcome.code == 2
    (error,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))  # diffusers shows bars
    for fragment in fragments:
        assert fragment.format(folder=folder) in error
