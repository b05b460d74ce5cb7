"""Every mistake a user can make is one line with the place and the nearest right name, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.cli.lab import Lab, call, edit_json, other_scheduler, write_teacher


class Case(NamedTuple):
    """A mistake: the command line that makes it, and what the line on stderr must hold."""

    id: str
    arguments: Callable[[Lab], list[str]]
    fragments: tuple[str, ...]


def case(id: str, arguments: Callable[[Lab], list[str]], *fragments: str) -> Case:
    return Case(id, arguments, fragments)


def override(word: str, *fragments: str, method: str = "dmd2") -> Case:
    """The working run with one changed word."""
    return case(word, lambda lab: lab.train(word, method=method), *fragments)


def text(id: str, content: str, *fragments: str) -> Case:
    """A config file of that text."""
    return case(id, lambda lab: ["train", lab.text(content)], *fragments)


COMMAND_LINE = [
    case("no such command", lambda lab: ["trian"], "'trian'", "mean 'train'"),
    case("no such option", lambda lab: ["verify", "dmd2", "--mixtur", "x"], "--mixtur", "--mixture"),
    case("missing argument", lambda lab: ["train"], "Missing argument 'config'"),
    case("option out of range", lambda lab: ["verify", "dmd2", "--steps", "0"], "--steps", "greater than or equal"),
    case("option above range", lambda lab: ["verify", "dmd2", "--steps", "9"], "--steps", "less than or equal"),
    case("option of another type", lambda lab: ["verify", "dmd2", "--steps", "two"], "--steps", "integer"),
    case("negative seed", lambda lab: ["demo", "--seed", "-1"], "--seed", "greater than or equal to 0"),
    case("too few samples", lambda lab: ["evaluate", "x", "--samples", "1"], "--samples", "2"),
    case("unknown method", lambda lab: ["methods", "dmd"], "'dmd'", "registered: adversarial", "mean 'dmd2'"),
]

CONFIG_FILE = [
    case("no such config", lambda lab: ["train", "emoji32/dmd3"], "'emoji32/dmd3'", "mean 'emoji32/dmd2'"),
    case("near file", lambda lab: ["train", lab.config().replace("run.y", "rn.y")], "rn.yaml'", "run.yaml'?"),
    case("folder as config", lambda lab: ["train", str(lab.folder)], "is a folder"),
    text("empty file", "", "run.yaml: a mapping of sections is needed (run, teacher", "found an empty file"),
    text("list", "[1, 2]", "run.yaml: a mapping of sections is needed", "found a list"),
    text("one number", "5", "run.yaml: a mapping of sections is needed", "found a single value"),
    text("one word", "hello", "hello: unknown key, allowed are run, teacher"),
    text("tab", "run:\n\tdir: x", "run.yaml, line 2, column 1", "not with tabs"),
    text("doubled key", "run: {dir: x}\nrun: {dir: y}", "run.yaml, line 2", "run"),
    text("open bracket", "run: {dir: x", "run.yaml, line ", "expected"),
    case("no text", lambda lab: ["train", lab.data(b"\xff\xfe\x00", "run.yaml")], "run.yaml", "UTF-8"),
    text("no run", "method: {name: pretrain}", "run: missing", "dir, seed"),
    text("no method", "run: {dir: x}", "method: missing"),
    text("method without name", "run: {dir: x}\nmethod: {solver: ddim}", "method: ", "name", "dmd2"),
    text("interpolation", "run: {dir: '${nowhere}'}", "run.yaml", "nowhere"),
]

VALUES = [
    override("steps", "'steps'", "key=value", "train.steps=200"),
    override("=3", "'=3'", "key=value"),
    override("train.steps=[", "'train.steps=['", "YAML"),
    override("traim.steps=3", "traim: unknown key", "mean 'train'"),
    override("train.stepz=3", "train.stepz: unknown key", "mean 'steps'"),
    override("train.steps=many", "train.steps: a whole number", "'many'"),
    override("train.steps=1.5", "train.steps: a whole number", "1.5"),
    override("train.steps=true", "train.steps", "found true"),
    override("train.steps=0", "train.steps", "greater than or equal to 1", "found 0"),
    override("train.precision=fp16", "train.precision", "'fp32', 'bf16' or 'bf16_weights'", "'fp16'", "mean 'bf16'"),
    override("train=5", "train: a section with the keys steps", "found 5"),
    override("train.ema=1.0", "train.ema", "less than 1", "found 1.0"),
    override("optim.lr=.nan", "optim.lr: a finite number", "nan"),
    override("optim.lr=-0.1", "optim.lr", "greater than 0", "-0.1"),
    override("optim.betas=[0.9]", "optim.betas", "too short", "[0.9]"),
    override("optim.betas=[0.9,0.9,0.9]", "optim.betas: at most 2 values"),
    override("optim.betas=[0.9,1.0]", "optim.betas.1", "less than 1"),
    override("optim.players.fake_scor.lr=1", "optim.players.fake_scor", "mean 'fake_score'"),
    override("optim.players.student.lrr=1", "optim.players.student.lrr: unknown key", "mean 'lr'"),
    override("student.steps=9", "student.steps", "less than or equal to 8", "found 9"),
    override("student.new.netwerk=X", "student.new.netwerk: unknown key", "mean 'network'"),
    override("student.new.network=UNet2DModle", "'UNet2DModle'", "mean 'UNet2DModel'"),
    override("student.new.process=flow", "student.new.prediction", "v_prediction", "goes with velocity"),
    override("student.new.config={block_out_chanels: [8]}", "student.new.config.block_out_chanels", "_channels'"),
    override("student={lora: 2, new: {}}", "student.lora", "student.new"),
    override("train.accumulate=3", "data.batch_size: 4", "train.accumulate=3"),
    override("data.name=emoji33", "data.name", "'emoji33'", "mean 'emoji32'"),
    override("data.name=mixture", "data.name: mixture", "fewstep verify"),
    override("data.options.flop=true", "data.options.flop: unknown key", "mean 'flip'"),
    override("data.size=2", "data.size", "8", "found 2"),
    override("data.size=16", "data.path", "smaller than size 16", "allow_upscale"),
    override("method.name=dmd3", "method: unknown method 'dmd3'", "mean 'dmd2'"),
    override("method.critic_update=3", "method.critic_update: unknown key", "mean 'critic_updates'"),
    override("method.gan_features=teachr", "method.gan_features", "'teachr'", "mean 'teacher'"),
    override("method.renoise=[0.9,0.1]", "method.renoise", "rising", "[0.9, 0.1]"),
    override("method.regression_weight=1", "method.regression_weight", "without pairs"),
    override("method={name: dmd2, regression_weight: 1, pairs: /no/pairs}", "method.pairs: /no/pairs", "read"),
    override("method.r1_weight=1", "method.r1_weight: 1.0", "without gan_weight"),
    override("method.solver=dim", "method.solver", "'dim'", "mean 'ddim'", method="consistency"),
    override("method.guidance_range=[3,1]", "method.guidance_range", "below", "[3.0, 1.0]", method="consistency"),
    override("method.skip=99", "skip", "99", method="consistency"),
]

TEACHER = [
    override("teacher.path=emoji3", "teacher.path", "'emoji3'"),
    override("teacher.path=null", "teacher.path: missing", "dmd2 distils a teacher"),
    override("teacher={path: null, guidance: 2}", "teacher.guidance: 2.0", method="pretrain"),
    override("teacher.guidance=high", "teacher.guidance: a number from 0 up", "two of them", "found 'high'"),
    override("teacher.guidance=-1", "teacher.guidance: a number from 0 up", "found -1"),
    override("teacher.guidance=[4,2]", "teacher.guidance", "the smaller one first", "found [4, 2]"),
    override("teacher.guidance=true", "teacher.guidance", "found true"),
    override("teacher={path: null, weak: x}", "teacher.weak: 'x' given, but no teacher.path", method="pretrain"),
    override("teacher.guidance_interval=[0.6,0.2]", "teacher.guidance_interval", "rising", "[0.6, 0.2]"),
    override(
        "teacher.guidance_interval=[0.2,0.6]", "teacher.guidance_interval: (0.2, 0.6)", "teacher.guidance=1 is off"
    ),
    override("teacher.weak_condition=nul", "teacher.weak_condition", "'same' or 'unconditional'"),
    override("teacher.weak_condition=unconditional", "teacher.weak_condition: 'unconditional'", "without weak"),
    case("negative class", lambda lab: guided(lab, "negative: 4"), "teacher.negative: 4", "classes are 0 to 3"),
    case("idle negative", lambda lab: guided(lab, f"negative: 1, weak: {lab.teacher}"), "teacher.negative: 1", "same"),
    override("student.path=emoji3", "student.path: no folder or embedded teacher 'emoji3'", "mean 'emoji32'"),
    case("no weak model", lambda lab: guided(lab, "weak: emoji3"), "teacher.weak: no folder", "'emoji3'"),
    case(
        "weak of another process",
        lambda lab: guided(lab, f"weak: {of_another_process(lab)}"),
        "teacher.weak: the noise schedule of",
        "they must agree",
    ),
    case(
        "weak of other classes",
        lambda lab: guided(lab, f"weak: {write_teacher(lab.folder / 'weak', classes=3)}"),
        "teacher.weak",
        "has 3 classes, the teacher 4",
    ),
    case(
        "scale without classes",
        lambda lab: [*lab.broken_teacher(lambda p: tiny.unet2d(8).save_pretrained(p / "unet")), "teacher.guidance=2"],
        "teacher.guidance: 2.0 needs a conditional teacher",
    ),
    case("no index", lambda lab: lab.broken_teacher(lambda p: (p / "model_index.json").unlink()), "model_index.json"),
    case(
        "broken index",
        lambda lab: lab.broken_teacher(lambda p: (p / "model_index.json").write_text("{")),
        "model_index.json: not JSON",
    ),
    case(
        "no network",
        lambda lab: lab.broken_teacher(
            lambda p: edit_json(p / "model_index.json", unet=["diffusers", "AutoencoderKL"])
        ),
        "UNet2DModel",
        "unet: AutoencoderKL",
    ),
    case(
        "two networks",
        lambda lab: lab.broken_teacher(lambda p: edit_json(p / "model_index.json", other=["diffusers", "UNet2DModel"])),
        "unet and other are networks both",
        "pipelines of one network are known",
    ),
    case(
        "unknown network",
        lambda lab: lab.broken_teacher(lambda p: edit_json(p / "unet" / "config.json", _class_name="UNet2DModell")),
        "'UNet2DModell'",
        "mean 'UNet2DModel'",
    ),
    case(
        "no weights",
        lambda lab: lab.broken_teacher(lambda p: next((p / "unet").glob("*.safetensors")).unlink()),
        "unet: no *.safetensors",
    ),
    case(
        "corrupt weights",
        lambda lab: lab.broken_teacher(lambda p: next((p / "unet").glob("*.safetensors")).write_bytes(b"x" * 99)),
        "unet: the weights cannot be read",
    ),
    case(
        "weights of another network",
        lambda lab: lab.broken_teacher(lambda p: edit_json(p / "unet" / "config.json", block_out_channels=[8, 32])),
        "unet: the weights cannot be read",
    ),
    case(
        "no scheduler",
        lambda lab: lab.broken_teacher(lambda p: (p / "scheduler" / "scheduler_config.json").unlink()),
        "scheduler_config.json",
    ),
    case(
        "unknown prediction",
        lambda lab: lab.broken_teacher(
            lambda p: edit_json(p / "scheduler" / "scheduler_config.json", prediction_type="epsilom")
        ),
        "prediction_type 'epsilom'",
        "epsilon",
    ),
    case("no noise table", lambda lab: lab.broken_teacher(other_scheduler), "CMStochasticIterativeScheduler"),
]

DATA = [
    case(
        "no folder",
        lambda lab: lab.train(f"data.path={lab.images}z"),
        "data.path: no folder",
        f"mean {'images'!r}",
    ),
    override("data.path=null", "data.path: missing", "data.name=folder"),
    case("empty folder", lambda lab: lab.train(f"data.path={make(lab.folder / 'none')}"), "holds no image", ".png"),
    case(
        "unreadable image",
        lambda lab: lab.broken_images(lambda p: [i.write_bytes(b"no image") for i in p.glob("class0/*")]),
        "class0/0.png' cannot be read as an image",
    ),
    case(
        "loose image",
        lambda lab: lab.broken_images(lambda p: (p / "class0" / "0.png").rename(p / "loose.png")),
        "class sub-folder",
        "'loose.png'",
    ),
    case(
        "class count",
        lambda lab: lab.broken_images(lambda p: (p / "class0").rename(p / "class1" / "in")),
        "3 classes in the data, 4 in the teacher",
    ),
    override("data={name: digits, path: null, size: null}", "data.name", "1 channels", "takes 3"),
    override("data={name: digits, path: null, size: 16}", "data.size: found 16", "8"),
    override("data={name: emoji32, path: /x, size: null}", "data.path", "takes no path", "data.name=folder"),
]


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


RUNS = [
    case("run is a file", lambda lab: lab.train(f"run.dir={lab.text('', 'file')}"), "run.dir", "file", "exists"),
    case("run below a file", lambda lab: lab.train(f"run.dir={lab.text('', 'file')}/x"), "run.dir", "directory"),
    case(
        "another config",
        lambda lab: lab.resumed("optim.lr=0.5", "method.critic_updates=3"),
        "step-00000002 was made by another config",
        "method.critic_updates was 5, is 3",
        "optim.lr was 0.0001, is 0.5",
        "run.dir",
    ),
    case("never resume", lambda lab: lab.resumed("train.resume=never"), "run.dir", "step-00000002", "resume=auto"),
    case(
        "damaged checkpoint",
        lambda lab: damaged(lab, "player-student.safetensors"),
        "player-student.safetensors: damaged or missing",
        "remove",
    ),
    case("damaged counters", lambda lab: damaged(lab, "state.json"), "state.json"),
    case("no source", lambda lab: ["evaluate", str(lab.folder / "none")], "none'"),
    case("no run to export", lambda lab: ["export", str(lab.folder), str(lab.folder / "out")], "no config.json"),
    case("no checkpoint", lambda lab: ["export", unfinished(lab), str(lab.folder / "out")], "no checkpoint yet"),
    case("no checkpoint to score", lambda lab: ["evaluate", unfinished(lab)], "no checkpoint yet"),
    case(
        "unknown features",
        lambda lab: ["evaluate", str(lab.trained), "--features", "clasifier"],
        "features",
        "'clasifier'",
        "mean 'classifier'",
    ),
    case(
        "unknown reference",
        lambda lab: ["evaluate", str(lab.trained), "--reference", "emoji33"],
        "--reference",
        "mean 'emoji32'",
    ),
    case(
        "reference of another size",
        lambda lab: ["evaluate", str(lab.trained), "--reference", "emoji32"],
        "--reference: emoji32",
        "(3, 32, 32)",
        "(3, 8, 8)",
    ),
    case(
        "figures into a folder",
        lambda lab: ["evaluate", str(lab.trained), "--json", str(lab.folder)],
        "--json",
        "is a folder",
    ),
    case("no such source", lambda lab: ["sample", "emoji3"], "source: no folder or embedded teacher", "mean 'emoji32'"),
    case("no such class", lambda lab: ["sample", str(lab.trained), "--classes", "class9"], "classes", "mean 'class"),
    case("guided student", lambda lab: ["sample", str(lab.trained), "--guidance", "2"], "guidance: 2.0", "few-step"),
    case("export onto a folder", lambda lab: ["export", str(lab.trained), str(lab.images)], "export", "new folder"),
]


def guided(lab: Lab, words: str) -> list[str]:
    """The working run with a guided teacher."""
    return lab.train(f"teacher={{guidance: 2, {words}}}")


def of_another_process(lab: Lab) -> Path:
    folder = write_teacher(lab.folder / "weak")
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_end=0.03)
    return folder


def damaged(lab: Lab, name: str) -> list[str]:
    arguments = lab.resumed()
    paths = list(lab.folder.glob(f"again/checkpoints/step-*/{name}"))
    assert len(paths) == 2
    for path in paths:
        path.write_bytes(b"x")
    return arguments


def unfinished(lab: Lab) -> str:
    folder = make(lab.folder / "unfinished")
    (folder / "config.json").write_text(json.dumps(lab.values()))
    return str(folder)


VERIFY = [
    case("verify an unknown method", lambda lab: ["verify", "dmd22"], "'dmd22'", "mean 'dmd2'"),
    case("no mixture", lambda lab: ["verify", "dmd2", "--mixture", "/no/file.json"], "/no/file.json", "cannot be read"),
    case(
        "broken mixture",
        lambda lab: ["verify", "dmd2", "--mixture", lab.text("{", "mixture.json")],
        "mixture.json: not a JSON file",
    ),
    case("unknown key", lambda lab: lab.mixture(std=[1]), "mixture.json: std: unknown key", "mean 'stds'"),
    case("lengths", lambda lab: lab.mixture(weights=[1.0]), "mixture.json", "1", "2"),
    case("negative std", lambda lab: lab.mixture(stds=[0.1, -0.1]), "mixture.json: std", "-0.1"),
    case("17 dimensions", lambda lab: lab.mixture(means=[[0.0] * 17] * 2), "mixture.json", "17", "16"),
    case("uneven means", lambda lab: lab.mixture(means=[[0.0], [0.0, 1.0]]), "mixture.json: means"),
    case("labels with a gap", lambda lab: lab.mixture(labels=[0, 2]), "mixture.json: labels"),
    case("no number", lambda lab: lab.mixture(means=["a", "b"]), "mixture.json: means", "'a'"),
]

WATCHED = [
    override("evaluate={every: 1, features: clasifier}", "evaluate.features", "'clasifier'", "mean 'classifier'"),
    override("evaluate={every: 1, best: fid}", "evaluate.best: 'fid'", "measures fd, kid, accuracy", "mean 'fd'"),
    override("evaluate={every: 1, reference: emoji33}", "evaluate.reference", "'emoji33'", "mean 'emoji32'"),
    override("evaluate.samples=5", "evaluate.samples: 5", "without every"),
    override("health.samples=30", "health.samples", "multiple of 4", "found 30"),
    override("health={every: 0, samples: 16}", "health.samples: 16", "without every"),
    override("train.trackers=[tensorbord]", "train.trackers.0", "'tensorbord'", "mean 'tensorboard'"),
]

CASES = [*COMMAND_LINE, *CONFIG_FILE, *VALUES, *TEACHER, *DATA, *RUNS, *VERIFY, *WATCHED]


def check(code: int, err: str, fragments: tuple[str, ...]) -> None:
    assert code == 2, err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert [fragment for fragment in fragments if fragment not in err] == [], err


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_mistake_is_one_clear_line(case, lab):
    outcome = call(*case.arguments(lab))
    check(outcome.code, outcome.err, case.fragments)


def test_the_run_that_the_mistakes_are_made_in_works(lab):
    assert (lab.trained / "checkpoints" / "step-00000002").is_dir()
    assert call(*lab.resumed()).code == 0


AT_ONCE = ("no such command", "option out of range")
AFTER_TORCH = ("corrupt weights", "unreadable image")


def in_a_process(case: Case, lab: Lab) -> None:
    arguments = [sys.executable, "-m", "fewstep", *case.arguments(lab)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    check(done.returncode, done.stderr, case.fragments)


def named(ids: tuple[str, ...]) -> list[Case]:
    return [case for case in CASES if case.id in ids]


@pytest.mark.parametrize("case", named(AT_ONCE), ids=AT_ONCE)
def test_a_real_process_says_it_alike(case, lab):
    in_a_process(case, lab)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(AFTER_TORCH), ids=AFTER_TORCH)
def test_a_real_process_that_loads_networks_says_it_alike(case, lab):
    in_a_process(case, lab)
