"""Adapters as a file that the teacher's pipeline loads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import with_guidance_input
from fewstep.models.load import load_denoiser
from fewstep.pipelines import check
from fewstep.pipelines.card import CardFacts, snippet
from fewstep.pipelines.export import export_student
from fewstep.pipelines.lora_file import FILE
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.plan import Form
from fewstep.pipelines.recipes import recipe_of
from tests import tiny, tiny_pipelines
from tests.pipelines.conftest import Student

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]
ADAPTERS = Form(lora=True)
OWN = ("sd15", "sdxl", "playground", "flux", "flux_guidance")
"""Whose stock pipelines feed a guidance scale to their networks."""
QUICK = ("sd15", "flux_guidance", "dit")


def adapted(student: Student, convolutions: bool = False) -> NetworkDenoiser:
    """The student as an adapter beside another one, both as after some training."""
    student.denoiser.adapters.convolutions = convolutions
    view = student.denoiser.lora_view("student", 4)
    other = student.denoiser.lora_view("fake_score", 2).with_scalar("step")
    generator = torch.Generator().manual_seed(1)
    for parameter in [*view.parameters().values(), *other.parameters().values()]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return view


def exported(view: NetworkDenoiser, folder: Path | None, out: Path, form: Form = ADAPTERS, steps: int = 2) -> Sampler:
    sampler = Sampler.of(view.process, steps)
    export_student(view, sampler, folder, out, CardFacts("dmd2", "Yin et al. 2024", teacher=str(folder)), form)
    return sampler


@pytest.mark.parametrize(("name", "convolutions"), [("sd15", False), ("sd15", True), ("sd3", False)])
def test_the_teachers_pipeline_loads_the_file(teachers, tmp_path, name, convolutions):
    student = teachers(name)
    view = adapted(student, convolutions)
    sampler = exported(view, student.folder, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "fewstep.json", FILE, "scheduler"]
    assert check.check(tmp_path / "out", view, sampler) <= check.allowed(view, sampler)
    without = dict.fromkeys(read_manifest(tmp_path / "out").missing)
    pipeline: Any = DiffusionPipeline.from_pretrained(student.folder, **without)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=FILE)
    inputs = tiny.inputs(tiny.sd3() if name == "sd3" else tiny.unet_sd15())
    with torch.no_grad():
        answer = getattr(pipeline, view.family.component).eval()(**inputs, return_dict=False)[0]
        view.adapters.activate("student")
        view.network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        expected = view.network(**inputs, return_dict=False)[0]
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)
    names = load_file(tmp_path / "out" / FILE)
    assert len(names) == len(view.adapters.parameters("student"))
    assert not [key for key in names if "fake_score" in key or "second" in key]


def test_the_cards_snippet_loads_it(teachers, tmp_path):
    student = teachers("sd15")
    exported(adapted(student), student.folder, tmp_path / "out", steps=3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters (LoRA) for a network of 3 sampling steps" in text
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert type(names["pipeline"].scheduler).__name__ == "LCMScheduler"
    assert len(names["images"]) == 1


@pytest.mark.parametrize(("base", "named"), [("a/b", "'a/b'"), ("a/b@1f", "'a/b', revision='1f'")])
def test_the_snippet_names_the_commit_of_its_base(teachers, tmp_path, base, named):
    student = teachers("sd15")
    exported(adapted(student), student.folder, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    told = snippet(replace(manifest, base=base), recipe_of(student.denoiser, manifest.pipeline), tmp_path / "out")
    assert f"DiffusionPipeline.from_pretrained({named}" in told
    assert ("revision" in told) == ("@" in base)


def test_adapters_are_stored_in_the_dtype_asked_for(teachers, tmp_path):
    student = teachers("sd3")
    exported(adapted(student), student.folder, tmp_path / "out", Form(torch.bfloat16, lora=True))
    assert {value.dtype for value in load_file(tmp_path / "out" / FILE).values()} == {torch.bfloat16}


def test_what_leaves_no_file_is_told(teachers, pixels, tmp_path):
    sd3 = teachers("sd3")
    spanned = adapted(sd3).with_scalar("span", 10.0)
    for view, folder, told in [
        (teachers("sd15").denoiser, teachers("sd15").folder, "this run trained all weights"),
        (adapted(teachers("dit")), teachers("dit").folder, "DiTPipeline loads no adapters; leave it out"),
        (adapted(pixels), None, "ConsistencyModelPipeline loads no adapters"),
        (spanned, sd3.folder, r"the student has an input \(span\) of its own"),
    ]:
        with pytest.raises(UserError, match=f"--lora: .*{told}"):
            exported(view, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def hears_a_scale(name: str, room: Path) -> tuple[NetworkDenoiser, Path]:
    """An adapter of a whole tiny pipeline that takes a guidance scale, as after some training; and the folder."""
    folder = tiny_pipelines.saved(name, room)
    view = with_guidance_input(load_denoiser(str(folder)).lora_view("student", 4), (1.0, 5.0))
    generator = torch.Generator().manual_seed(1)
    for parameter in view.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return view, folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in tiny_pipelines.PIPELINES]
)
def test_an_adapter_with_a_guidance_scale_leaves_by_its_class_s_own_input_where_that_has_one(tmp_path, name):
    """As a file of adapters only where the teacher's network has the input: it would hold adapters alone."""
    view, folder = hears_a_scale(name, tmp_path)
    lora = name == "flux_guidance"
    if not lora:
        with pytest.raises(UserError, match=r"--lora: (beside its adapters the student has an input|.* loads no adap)"):
            exported(view, folder, tmp_path / "refused")
    sampler = exported(view, folder, tmp_path / "out", Form(lora=lora))
    assert check.check(tmp_path / "out", view, sampler) <= check.allowed(view, sampler)
    manifest = read_manifest(tmp_path / "out")
    assert ("FewStep" in str(manifest.own)) == (name not in OWN)
    assert manifest.guidance == 3.0
    if name in OWN:
        assert manifest.call["guidance_scale"] == 3.0
