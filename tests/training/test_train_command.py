"""`fewstep train` as a user runs it: in processes of its own, killed, and on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.training.checkpoint import sha256
from fewstep.training.finished import load_run
from fewstep.training.integrity import files_of, read_facts
from fewstep.training.tensor_files import opened
from tests.tiny import alive, unet2d_classes

ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "default", "COLUMNS": "200"}
METHODS = {
    "dmd2": {"name": "dmd2", "critic_updates": 2, "gan_weight": 0.01},
    "consistency": {"name": "consistency", "solver": "ddim", "intervals": 10},
}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    network = alive(unet2d_classes(8, 10, 1))
    DDIMPipeline(network, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def written(tmp_path: Path, teacher: Path, method: str, steps: int) -> Path:
    path = tmp_path / f"{method}.yaml"
    run = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"path": str(teacher)},
        "method": METHODS[method],
        "data": {"name": "digits", "batch_size": 4},
        "optim": {"decay": "cosine"},
        "train": {"steps": steps, "checkpoint_every": 4, "log_every": 1, "sample_every": 0, "threads": 1},
    }
    path.write_text(yaml.safe_dump(run))
    return path


def command(path: Path, folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "fewstep", "train", str(path), f"run.dir={folder}", *words]


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def kill_after(words: list[str], folder: Path, step: int) -> None:
    """SIGKILL as soon as the log tells of `step`."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while last_step(folder) < step:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def last_step(folder: Path) -> int:
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def final(folder: Path, step: int) -> dict[str, str]:
    """Digests of the last checkpoint's files."""
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {path.name: sha256(path) for path in files}


def log(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds" and key[:6] != "speed/"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "workers"), [("dmd2", 0), ("consistency", 2)])
def test_killed_and_started_again_ends_at_the_same_bits(tmp_path, teacher, method, workers):
    steps = 60
    path = written(tmp_path, teacher, method, steps)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(command(path, straight))
    for step in (7, 26):
        kill_after(command(path, killed, f"data.workers={workers}"), killed, step)
    done = finish(command(path, killed))
    assert "resumed from" in done.stdout
    assert f"step {steps} of {steps}, done" in done.stdout
    assert "player-student.safetensors" in final(straight, steps)
    assert "average-ema.safetensors" in final(straight, steps)
    assert final(killed, steps) == final(straight, steps)
    assert log(killed) == log(straight)
    assert [line["step"] for line in log(killed)] == list(range(1, steps + 1))


SMOOTH = ("optim.eps=1e-4", "optim.lr=1e-3")
"""Adam divides a gradient by its own size, so that where it is only rounding, a step is as large as elsewhere. Keys of
an attention have such a bias, which softmax does not see, and weights before a normalisation are near it: with the
default of 1e-8, sums in another order alone move these up to 1.6e-5 apart in six steps, sharded or not. An ε above the
rounding leaves the gradients themselves to compare."""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("method", ["dmd2", "consistency"])
def test_two_launched_ranks_are_one_process(tmp_path, teacher, method, shard):
    path = written(tmp_path, teacher, method, 6)
    finish(command(path, tmp_path / "one", *SMOOTH))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0", "-m"]  # fmt: skip
    words = (*SMOOTH, f"train.shard={shard}", "train.sample_every=3")
    finish([*launch, *command(path, tmp_path / "two", *words)[2:]])
    assert (tmp_path / "two" / "samples" / "step-00000006.png").is_file()
    assert final(tmp_path / "two", 6)["rng.safetensors"] == final(tmp_path / "one", 6)["rng.safetensors"]
    one, two = (weights(tmp_path / name / "checkpoints" / "step-00000006") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    first = load_file(next((teacher / "unet").glob("*.safetensors")))
    assert max(float((one[f"player-student {key}"] - value).abs().max()) for key, value in first.items()) > 5e-4
    student = load_run(tmp_path / "two").student.parameters()
    for key, value in two.items():
        if key.startswith("average-ema "):
            assert torch.equal(student[key.removeprefix("average-ema ")], value), key


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Players and averages, whole, however the checkpoint is cut."""
    facts = read_facts(checkpoint)
    names = {file.removesuffix(".safetensors").partition("/")[0] for file in facts["sha256"]}
    out = {}
    for name in (one for one in names if one.startswith(("player", "average"))):
        with opened([checkpoint / file for file in files_of(facts, name)]) as stored:
            out |= {f"{name} {key}": stored.read(key) for key in stored.shapes}
    return out


def test_a_folder_with_a_checkpoint_can_be_refused(tmp_path, teacher, capsys):
    from fewstep.commands.train import run

    path = written(tmp_path, teacher, "consistency", 2)
    run(path, [])
    assert (tmp_path / "run" / "config.json").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "average-ema.safetensors").is_file()
    with pytest.raises(UserError, match=r"run.dir: .* holds step-00000002; resume with train.resume=auto"):
        run(path, ["train.resume=never"])
    with pytest.raises(UserError, match=r"made by another config \(optim.lr was 0.0001, is 0.01\); .* with --force"):
        run(path, ["optim.lr=0.01"])
    before = final(tmp_path / "run", 2)
    run(path, [])
    assert final(tmp_path / "run", 2) == before, "a finished run stays as it is"
    capsys.readouterr()
    run(path, ["optim.lr=0.01", "train.steps=3"], force=True)
    assert capsys.readouterr().out.splitlines() == [
        "warning: forced, optim.lr was 0.0001, is 0.01; train.steps was 2, is 3",
        f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}",
        f"{tmp_path / 'run'}: step 3 of 3, done",
    ]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, teacher):
    from fewstep.commands.train import run

    (tmp_path / "file").write_text("in the way")
    path = written(tmp_path, teacher, "consistency", 2)
    with pytest.raises(UserError, match=r"run.dir: .*file/run cannot be written: Not a directory"):
        run(path, [f"run.dir={tmp_path / 'file' / 'run'}"])


def test_samples_are_drawn_without_touching_the_run(tmp_path, teacher):
    from fewstep.commands.train import run

    path = written(tmp_path, teacher, "dmd2", 3)
    run(path, ["run.dir=" + str(tmp_path / "with"), "train.sample_every=1"])
    run(path, ["run.dir=" + str(tmp_path / "without")])
    assert final(tmp_path / "with", 3) == final(tmp_path / "without", 3)
    assert len(list((tmp_path / "with" / "samples").glob("*.png"))) == 3
