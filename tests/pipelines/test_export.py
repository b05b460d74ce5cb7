"""The folder an export is, the card in it, and the check in a fresh process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.pipelines import check, export, reload
from fewstep.pipelines.card import license_of
from fewstep.pipelines.export import export_student
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.merge import plain_network
from tests import tiny
from tests.pipelines.conftest import FACTS, Student


def exported(student: Student, out: Path, steps: int = 4) -> Sampler:
    sampler = Sampler.of(student.denoiser.process, steps)
    export_student(student.denoiser, sampler, student.folder, out, FACTS)
    return sampler


def perturb(out: Path) -> None:
    path = out / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] += 1e-3
    save_file(tensors, path)


def test_a_fresh_process_without_fewstep_makes_the_same_samples(pixels, tmp_path):
    sampler = exported(pixels, tmp_path / "out")
    assert check.check(tmp_path / "out", pixels.denoiser, sampler) <= 1e-5


@pytest.mark.slow
def test_a_fresh_process_finds_a_changed_weight(pixels, tmp_path):
    sampler = exported(pixels, tmp_path / "out")
    perturb(tmp_path / "out")
    with pytest.raises(check.ReloadFailure, match="differ by up to"):
        check.check(tmp_path / "out", pixels.denoiser, sampler)


@pytest.mark.slow
def test_a_fresh_process_that_needs_fewstep_fails(pixels, tmp_path):
    sampler = exported(pixels, tmp_path / "out")
    index = tmp_path / "out" / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "scheduler": ["fewstep.errors", "UserError"]}))
    with pytest.raises(check.ReloadFailure, match=r"cannot use it: .*fewstep"):
        check.check(tmp_path / "out", pixels.denoiser, sampler)


def test_the_fresh_process_can_import_all_but_fewstep():
    finder = reload._NoFewstep()
    for name in ("fewstep", "fewstep.models"):
        with pytest.raises(ImportError, match="fewstep is not there"):
            finder.find_spec(name)
    assert finder.find_spec("fewsteps") is None


@pytest.mark.usefixtures("here")
def test_the_check_finds_a_changed_weight(pixels, tmp_path):
    sampler = exported(pixels, tmp_path / "out", steps=1)
    perturb(tmp_path / "out")
    with pytest.raises(check.ReloadFailure, match=r"differ by up to 0\.001, allowed is 1e-05"):
        check.check(tmp_path / "out", pixels.denoiser, sampler)


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_is_merged_into_plain_weights(cosine, tmp_path):
    teacher = make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(cosine, Kind.V))
    other, student = teacher.lora_view("fake_score", 2), teacher.lora_view("student", 4)
    for view in (other, student):
        for parameter in view.parameters().values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([999.0, 500.0]), Condition.of_labels(torch.tensor([0, 1]))
    with torch.no_grad():
        expected, base = student(x, t, labels).value, teacher(x, t, labels).value
        plain = plain_network(student)(x, t, class_labels=labels.labels).sample
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    sampler = exported(Student(student), tmp_path / "out")
    assert check.check(tmp_path / "out", student, sampler) <= 1e-5
    names = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(names) == set(tiny.unet2d_classes().state_dict())


def test_the_folder_holds_a_pipeline_and_nothing_else(pixels, tmp_path):
    exported(pixels, tmp_path / "out")
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "fewstep.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.sampler == Sampler((999.0, 749.0, 499.0, 249.0))
    assert (manifest.call, manifest.config) == ({"num_inference_steps": 4}, {"run": {"seed": 0}})


def test_an_export_can_teach(pixels, tmp_path):
    exported(pixels, tmp_path / "out")
    again = load_denoiser(str(tmp_path / "out"))
    assert again.kind is Kind.V
    torch.testing.assert_close(again.process.step_list(4), pixels.denoiser.process.step_list(4), rtol=0, atol=0)


def test_the_teachers_other_components_come_along(teachers, tmp_path):
    student = teachers("sd15")
    exported(student, tmp_path / "out")
    before, after = (json.loads((f / "model_index.json").read_text()) for f in (student.folder, tmp_path / "out"))
    assert after == {**before, "scheduler": ["diffusers", "LCMScheduler"]}
    for name in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (student.folder / name).read_bytes()
    assert read_manifest(tmp_path / "out").missing == ()


def test_a_missing_component_is_named(teachers, tmp_path):
    exported(teachers("sd3"), tmp_path / "out")
    missing = read_manifest(tmp_path / "out").missing
    assert set(missing) == {f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    assert "The teacher's folder lacked text_encoder" in (tmp_path / "out" / "README.md").read_text()


def test_a_failure_half_way_leaves_nothing(pixels, tmp_path, monkeypatch):
    def fail(*_: object) -> str:
        assert (next(tmp_path.iterdir()) / "unet" / "config.json").is_file()
        raise RuntimeError("half-way")

    monkeypatch.setattr(export, "card", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        exported(pixels, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_earlier_export(pixels, tmp_path, monkeypatch):
    exported(pixels, tmp_path / "out", steps=1)
    with monkeypatch.context() as broken:
        broken.setattr(export, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UserError, match="cannot be written: disk full"):
            exported(pixels, tmp_path / "out", steps=2)
    assert len(read_manifest(tmp_path / "out").sampler.times) == 1
    exported(pixels, tmp_path / "out", steps=2)
    assert len(read_manifest(tmp_path / "out").sampler.times) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_refused(pixels, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than an export"):
        exported(pixels, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        exported(pixels, tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("steps", [3, 4])
def test_the_cards_snippet_runs(pixels, tmp_path, steps):
    exported(pixels, tmp_path / "out", steps)
    text = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) == 2
    names: dict = {}
    exec(code[1], names)
    assert [image.size for image in names["images"]] == [(8, 8), (8, 8)]


def test_the_card_tells_what_the_run_knows(pixels, tmp_path):
    facts = replace(
        FACTS,
        teacher="some/teacher@v1",
        license="apache-2.0",
        classes=("cat", "dog"),
        metrics={"fd": 1.25, "x": {"kid": 0.5}},
    )
    export_student(pixels.denoiser, Sampler.of(pixels.denoiser.process, 4), None, tmp_path / "out", facts)
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "library_name: diffusers",
        "license: apache-2.0",
        'base_model: "some/teacher"',
        "- Method: dmd2 (Yin et al. 2024)",
        "- Steps: 4",
        "- Timesteps: [999, 749, 499, 249]",
        "- Guidance scale: 1 (off)",
        "| fd | 1.25 |",
        "| x kid | 0.5 |",
        "0 cat, 1 dog",
        '  "seed": 0',
    ):
        assert line in text.splitlines(), line
    assert license_of(tmp_path / "out") == "apache-2.0"


def test_an_unstated_licence_is_not_stated(pixels, tmp_path):
    exported(pixels, tmp_path / "out")
    assert "- Licence of the teacher: not stated" in (tmp_path / "out" / "README.md").read_text().splitlines()
    assert license_of(tmp_path / "out") is None
    assert license_of(None) is None
    (tmp_path / "README.md").write_bytes("---\nauthor: Müller\nlicense: mit\n---\n".encode("latin-1"))
    assert license_of(tmp_path) == "mit"


def test_a_teacher_s_folder_is_no_base_model_on_the_hub(pixels, tmp_path):
    """The hub refuses a card whose `base_model` is no name there."""
    for number, (teacher, stated) in enumerate({str(tmp_path): False, "emoji32": False, "some/teacher": True}.items()):
        out = tmp_path / str(number)
        facts = replace(FACTS, teacher=teacher)
        export_student(pixels.denoiser, Sampler.of(pixels.denoiser.process, 4), None, out, facts)
        text = (out / "README.md").read_text()
        assert f"distilled from `{teacher}`" in text
        assert ("base_model: " in text) is stated


def test_a_folder_without_a_name_is_refused(pixels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^export: \. has no name to be put in place by; give a folder inside it$"):
        exported(pixels, Path())
