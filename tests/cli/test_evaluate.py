"""Figures of a source: the same in any batch, whole on disk, and of the sampler that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.commands import evaluate as command
from fewstep.commands.evaluate import make_images, sample_noise
from fewstep.commands.shards import Team, fingerprint, shards
from fewstep.commands.source import open_source
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.models.conditioning import Condition
from tests.cli.lab import call, write_teacher
from tests.tiny_features import MEANS
from tests.training.ranks import launch


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A cache of the test's own, and shards of a few images."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fewstep.commands.shards.SHARD", 12)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network of the size and classes that the shipped classifier knows."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), 32, 24)


@pytest.fixture
def figures(teacher, tmp_path):
    """What `evaluate` writes about that network."""

    def measure(*arguments: str) -> dict[str, object]:
        out = tmp_path / "figures" / "out.json"
        words = ["evaluate", str(teacher), "--samples", "30", "--steps", "1", "--json", str(out), *arguments]
        outcome = call(*words)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        assert list(out.parent.iterdir()) == [out]
        return json.loads(out.read_text()) | {"printed": outcome.out}

    return measure


def test_figures_do_not_depend_on_the_batch(figures, monkeypatch):
    monkeypatch.setattr("fewstep.commands.shards.SHARD", 200)
    one, other = (figures("--batch-size", n, "--steps", "2", "--samples", "70") for n in ("64", "37"))
    for name in ("fd", "kid", "kid_stderr"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert one["accuracy"] == other["accuracy"]
    assert (one["images"], one["real_images"], one["steps"], one["sampler"]) == (70, 70, 2, "ddim")
    assert f"fd                {one['fd']:.5g}" in str(one["printed"])
    assert f"(real: {one['floor']['fd']:.5g})" in str(one["printed"])


def test_a_result_says_what_it_depends_on(figures):
    result = figures("--metrics", "fd,pr,accuracy")
    assert result["features"].startswith("classifier@32 resize=none sha256:")
    assert result["classifier"] == result["features"]
    assert len(result["reference_sha256"]) == 64
    assert result["floor_images"] == 30
    names = {"fd", "precision", "recall", "density", "coverage", "accuracy"}
    assert names <= set(result)
    assert names <= set(result["floor"])
    assert result["floor"]["fd"] < result["fd"]
    assert result["floor"]["accuracy"] > 0.9 > result["accuracy"]
    assert figures("--seed", "1")["reference_sha256"] != result["reference_sha256"]


def without_time(result: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in result.items() if key not in ("seconds_per_image", "printed")}


def test_two_processes_make_the_figures_of_one(figures, teacher, monkeypatch):
    alone = figures("--batch-size", "5")
    sent: list[object] = []

    def gathered(self: Team, mine: list[object]) -> list[object]:
        sent.extend(mine)
        return list(reversed(sent))  # in whatever order they come

    monkeypatch.setattr(Team, "gathered", gathered)
    monkeypatch.setattr(Team, "here", lambda: Team(1, 2))
    assert call("evaluate", str(teacher), "--samples", "30", "--steps", "1", "--batch-size", "5").out == "", (
        "the first one tells"
    )
    assert len(sent) == 1
    monkeypatch.setattr(Team, "here", lambda: Team(0, 2))
    assert without_time(figures("--batch-size", "5")) == without_time(alone)
    assert len(sent) == 3


def test_two_processes_of_a_gloo_group(figures, teacher, tmp_path):
    alone = without_time(figures("--batch-size", "5", "--no-cache"))
    words = ["--samples", "30", "--steps", "1", "--batch-size", "5", "--no-cache"]

    def task(folder: Path) -> None:
        rank = torch.distributed.get_rank()
        outcome = call("evaluate", str(teacher), *words, "--json", str(folder / f"{rank}.json"))
        assert outcome.code == 0, outcome.err
        assert bool(outcome.out) == (rank == 0), "the first one tells"

    assert launch(task, tmp_path / "group") == [0, 0]
    assert sorted(path.name for path in (tmp_path / "group").glob("*.json")) == ["0.json"]
    assert without_time(json.loads((tmp_path / "group" / "0.json").read_text())) == alone


@pytest.mark.slow
def test_accelerate_launches_two_processes(teacher, tmp_path):
    words = ["evaluate", str(teacher), "--samples", "410", "--steps", "1", "--metrics", "fd,kid,accuracy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    results = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words_of_launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", f"--num_processes={count}",
                  "-m", "fewstep", *words, "--json", str(out)]  # fmt: skip
        done = subprocess.run(words_of_launch, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(without_time(json.loads(out.read_text())))
    assert results[0] == results[1]


def test_a_killed_run_goes_on_from_its_shards(figures, teacher, tmp_path, monkeypatch):
    whole = without_time(figures())
    folder, made = tmp_path / "samples", []
    make = command.make_shard

    def killed(source, sampler, rows, labels, batch, seed):
        if len(made) == 2:
            raise SystemError("killed")
        made.append(rows)
        return make(source, sampler, rows, labels, batch, seed)

    monkeypatch.setattr(command, "make_shard", killed)
    with pytest.raises(SystemError, match="killed"):
        call("evaluate", str(teacher), "--samples", "30", "--steps", "1", "--samples-dir", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "images-00000.safetensors", "images-00001.safetensors", "samples.json"]  # fmt: skip
    made.clear()
    assert without_time(figures("--samples-dir", str(folder))) == whole
    assert made == [range(24, 30)]
    made.clear()
    assert without_time(figures("--samples-dir", str(folder))) == whole
    assert made == []
    assert figures("--samples-dir", str(folder), "--samples", "40")["images"] == 40  # the last shard was not full
    assert made == [range(24, 36), range(36, 40)]


def test_a_damaged_shard_is_told_of_and_made_again(figures, teacher, tmp_path):
    folder = tmp_path / "samples"
    whole = without_time(figures("--samples-dir", str(folder)))
    path = folder / "images-00001.safetensors"
    before = load_file(path)["images"].clone()  # the file is mapped, not read
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    out = tmp_path / "again.json"
    words = ["--samples", "30", "--steps", "1", "--samples-dir", str(folder), "--json", str(out)]
    outcome = call("evaluate", str(teacher), *words)
    assert outcome.code == 0
    assert outcome.err.startswith(f"warning: {path} is damaged")
    assert outcome.err.count("\n") == 1
    assert without_time(json.loads(out.read_text())) == whole
    assert torch.equal(load_file(path)["images"], before)


def test_samples_of_another_kind_are_not_mixed(teacher, tmp_path):
    folder = tmp_path / "samples"
    words = ["evaluate", str(teacher), "--samples", "12", "--steps", "1", "--samples-dir", str(folder)]
    assert call(*words).code == 0
    outcome = call(*words, "--seed", "1")
    assert (outcome.code, "holds samples of another seed (0 there, 1 here)" in outcome.err) == (2, True)
    other = write_teacher(tmp_path / "other", 32, 24)
    (other / "note.json").write_text("{}")
    outcome = call("evaluate", str(other), *words[2:])
    assert (outcome.code, "holds samples of another source" in outcome.err) == (2, True)
    (folder / "samples.json").write_text("{")
    assert "--samples-dir" in call(*words).err
    assert fingerprint(str(teacher)) != fingerprint(str(other))


def test_png_files_hold_the_very_images(figures, tmp_path):
    plain = without_time(figures())
    assert without_time(figures("--png", str(tmp_path / "png"))) == plain
    assert len(list((tmp_path / "png").iterdir())) == 30


def test_the_reference_is_kept_and_a_damaged_entry_made_again(figures, teacher, tmp_path):
    whole = without_time(figures())
    entries = sorted((tmp_path / "cache" / "features").iterdir())
    assert len(entries) == 2  # the real images, and the others
    assert without_time(figures()) == whole
    entries[0].write_bytes(b"")
    outcome = call("evaluate", str(teacher), "--samples", "30", "--steps", "1", "--json", str(tmp_path / "out.json"))
    assert outcome.err.startswith(f"warning: cache entry {entries[0]} is damaged")
    assert without_time(json.loads((tmp_path / "out.json").read_text())) == whole
    assert sorted((tmp_path / "cache" / "features").iterdir()) == entries
    entries[0].unlink()
    assert without_time(figures("--no-cache")) == whole
    assert sorted((tmp_path / "cache" / "features").iterdir()) == entries[1:]


def test_an_earlier_result_stands_beside(figures, teacher, tmp_path, monkeypatch):
    earlier = tmp_path / "earlier.json"
    outcome = call("evaluate", str(teacher), "--samples", "30", "--steps", "1", "--json", str(earlier))
    assert outcome.code == 0
    before = json.loads(earlier.read_text())
    printed = str(figures("--steps", "2", "--compare", str(earlier))["printed"])
    assert f"before: {before['fd']:.5g})" in printed
    outcome = call(
        "evaluate", str(teacher), "--samples", "30", "--steps", "1", "--seed", "1", "--compare", str(earlier)
    )
    assert (outcome.code, "scores: reference_sha256 is" in outcome.err) == (2, True)

    def never(*_: object) -> None:
        raise AssertionError("nothing long may run before this is refused")

    monkeypatch.setattr(command, "make_shard", never)
    outcome = call("evaluate", str(teacher), "--samples", "40", "--compare", str(earlier))
    assert (outcome.code, "images is 40 here and 30 there, these results cannot be compared" in outcome.err) == (
        2,
        True,
    )
    outcome = call("evaluate", str(teacher), "--samples", "30", "--metrics", "fd", "--compare", str(earlier))
    assert "scores: classifier is" in outcome.err


def test_fd_infinity_lies_below_fd(figures):
    result = figures("--samples", "256", "--steps", "1", "--metrics", "fd", "--fd-infinity", "--batch-size", "12")
    assert 0.5 * result["fd"] < result["fd_infinity"] < result["fd"]


BAD = [
    (["--metrics", "fdd"], "metrics: none is named 'fdd'", "did you mean 'fd'?"),
    (["--metrics", "fd,,kid"], "metrics: none is named ''", "allowed are fd, fid"),
    (["--metrics", "is", "--samples", "12"], "metrics: is needs at least 20 images on each side, 12 were asked for"),
    (["--metrics", "fid"], "fid is kept for the features 'inception', found 'classifier'", "called fd"),
    (["--metrics", "clip"], "clip needs features that read captions (clip:ARCH:TAG_OR_PATH)"),
    (["--samples", "2"], "reference: 2 images were asked for, at least 3 are needed"),
    (["--fd-infinity", "--samples", "255"], "--fd-infinity: 256 images are needed for 64 features"),
    (["--features", "efficientnet"], "none is named 'efficientnet'", "did you mean 'efficientnet-lite0'?"),
    (["--features", "inception:/nowhere.pt"], "features 'inception': no file /nowhere.pt", "efficientnet-lite0 works"),
    (["--features", "dinov2:/nowhere"], "'/nowhere' is no folder with a model", "efficientnet-lite0 works"),
    (["--features", "module:nowhere.net"], "features 'module:nowhere.net': cannot be imported"),
    (["--reference", "digits"], "--reference: digits has images of shape (1, 8, 8), the source makes (3, 32, 32)"),
    (["--reference", "emoji33"], "--reference: data.name: no data set 'emoji33'"),
    (["--compare", "/nowhere.json"], "--compare: /nowhere.json cannot be read"),
    (["--compare", "/etc/hostname"], "--compare: /etc/hostname"),
    (["--samples-dir", "/etc/hostname/x"], "--samples-dir: /etc/hostname/x cannot be used"),
]


@pytest.mark.parametrize("mistake", BAD, ids=lambda mistake: " ".join(mistake[0]))
def test_a_mistake_is_one_line_before_anything_long(teacher, monkeypatch, mistake):
    def never(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(command, "make_shard", never)
    words, *fragments = mistake
    outcome = call("evaluate", str(teacher), *words)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    for fragment in fragments:
        assert fragment in outcome.err


def test_images_that_are_none(teacher, monkeypatch, tmp_path):
    def broken(source, sampler, rows, labels, batch, seed):
        images = torch.zeros(len(rows), *source.shape)
        images[3] = float("nan")
        return images

    monkeypatch.setattr(command, "make_shard", broken)
    outcome = call("evaluate", str(teacher), "--samples", "12", "--samples-dir", str(tmp_path / "samples"))
    assert (outcome.code, "images: 1 of 12 hold NaN or infinite pixels" in outcome.err) == (2, True)
    assert not list((tmp_path / "samples").glob("*.safetensors")), "a broken shard is not kept"


def test_a_folder_too_small_and_one_of_other_classes(lab):
    outcome = call("evaluate", str(lab.teacher), "--reference", str(lab.images), "--samples", "9")
    assert (outcome.code, "found 8 images in the data set, 9 were asked for" in outcome.err) == (2, True)
    outcome = call("evaluate", str(lab.teacher), "--reference", str(lab.images), "--samples", "6")
    assert "features 'classifier': trained on 24 classes" in outcome.err
    pixels = ["--features", MEANS, "--reference", str(lab.images), "--samples", "6"]
    outcome = call("evaluate", str(lab.teacher), *pixels, "--metrics", "accuracy")
    assert "metrics: accuracy needs a classifier of the reference's 4 classes" in outcome.err
    outcome = call("evaluate", str(lab.teacher), *pixels, "--steps", "1")
    assert outcome.code == 0, outcome.err
    assert "accuracy          -" in outcome.out


def test_shards_are_the_positions_in_order(monkeypatch):
    assert shards(30) == [range(12), range(12, 24), range(24, 30)]
    monkeypatch.setattr("fewstep.commands.shards.SHARD", 200)
    assert shards(200) == [range(200)]
    assert shards(0) == []


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Team.here() == Team(0, 1)
    assert Team.here().gathered([3]) == [3]


def test_another_seed_or_step_count_makes_other_figures(figures):
    first = figures("--steps", "1")["fd"]
    assert figures("--steps", "1")["fd"] == first
    assert figures("--steps", "1", "--seed", "1")["fd"] != first
    assert figures("--steps", "2")["fd"] != first


def test_a_teacher_takes_its_guidance(figures):
    assert figures("--steps", "1", "--guidance", "3")["guidance"] == 3.0


@pytest.mark.parametrize("kind", ["renoise", "ddim"])
def test_a_sample_is_a_function_of_seed_and_index(lab, kind):
    source = open_source(str(lab.teacher))
    sampler = Sampler.of(source.denoiser.process, 3, kind)
    whole, parts = make_images(source, sampler, 6, 6, seed=4), make_images(source, sampler, 6, 4, seed=4)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
    assert whole.wanted.labels is not None
    assert whole.wanted.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert not torch.allclose(whole.images[0], make_images(source, sampler, 1, 1, seed=5).images[0])


def test_samples_are_those_of_the_sampler(lab, monkeypatch):
    source = open_source(str(lab.teacher))
    sampler = Sampler.of(source.denoiser.process, 3)
    fresh = iter([sample_noise(source.shape, range(2), 4, step) for step in (1, 2)])
    monkeypatch.setattr("fewstep.diffusion.solvers._fresh_noise", lambda like, generator: next(fresh))
    with torch.no_grad():
        noise = sample_noise(source.shape, range(2), 4, 0)
        wanted = sample(source.denoiser, sampler, noise, Condition.of_labels(torch.arange(2)))
    assert torch.equal(make_images(source, sampler, 2, 2, seed=4).images, wanted)


def test_noise_is_normal_and_independent():
    noise = sample_noise((3, 8, 8), range(200), seed=0, step=0).flatten(1)
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.var()) == pytest.approx(1, abs=0.03)
    assert torch.equal(noise[7], sample_noise((192,), range(7, 8), seed=0, step=0)[0])
    for other in (sample_noise((192,), range(200), 0, 1), sample_noise((192,), range(200), 1, 0)):
        assert float((noise * other).mean()) == pytest.approx(0, abs=0.02)
