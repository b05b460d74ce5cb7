"""Exports opened again: what the student said, at its own steps and others, and as where another run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fewstep.commands.source import Source, open_any, open_source
from fewstep.config import Teacher
from fewstep.config_file import parse
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.errors import UserError
from fewstep.models.adapter_guidance import with_adapters
from fewstep.models.capture import Capture
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import at_scale, with_guidance, with_guidance_input
from fewstep.models.guide_network import guide_for, with_guide
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.two_time import two_time
from fewstep.pipelines.card import CardFacts
from fewstep.pipelines.export import export_student
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.plan import Form
from fewstep.training.assemble import build_method, guided_teacher
from fewstep.training.opening import Sources, open_sources
from fewstep.training.starting import at_one_scale, open_teacher
from tests import tiny, tiny_pipelines
from tests.cli.lab import call, edit_json, write_images
from tests.pipelines.conftest import Student

SCALES = (1.0, 5.0)
GUIDED = CardFacts("guidance", "Meng et al. 2023", few_step=False, guided=True)
FEW_STEP = CardFacts("meanflow", "Geng et al. 2025", few_step=True, teaches=False)


def trained(student: NetworkDenoiser, *parts: str) -> NetworkDenoiser:
    """With noise on the parameters whose names have one of `parts` in them: they start at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in student.network.named_parameters():
        if any(part in name for part in parts):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return student


def pixels(process: VP | Flow, kind: Kind = Kind.V, classes: int = 4) -> NetworkDenoiser:
    return make_denoiser(tiny.alive(tiny.unet2d_classes(8, classes, 3)), Schedule(process, kind))


def with_inside(denoiser: NetworkDenoiser, what: str) -> NetworkDenoiser:
    channels = cast(Any, denoiser.network).config["in_channels"]
    example = Batch(torch.randn(1, channels, 8, 8), Condition.of_labels(torch.tensor([1])), torch.zeros(1))
    if what == "adapters":
        return trained(with_adapters(denoiser.copy(), SCALES, example, 4, 8), "guidance_adapters")
    return trained(with_guide(denoiser.copy(), guide_for(denoiser, SCALES, example, 4, 8)), "guide.")


def lora(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """A two-time adapter's view beside a fake score on the same network."""
    student = two_time(denoiser.lora_view("student", 2))
    trained(student, ".lora_", ".second.")
    denoiser.lora_view("fake_score", 2).with_scalar("step")
    return student


def leave(student: NetworkDenoiser, sampler: Sampler, out: Path, facts: CardFacts = FEW_STEP,
          teacher: Path | None = None) -> NetworkDenoiser:  # fmt: skip
    """Exported and opened again, in fewstep's own classes."""
    export_student(student, sampler, teacher, out, facts)
    return load_denoiser(str(out))


def samples(denoiser: NetworkDenoiser, sampler: Sampler, scale: float | None = None, shape=(3, 8, 8)) -> Tensor:
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    condition, fresh = Condition.of_labels(torch.tensor([0, 2])), torch.Generator().manual_seed(2)
    with torch.no_grad():
        return sample(at_scale(denoiser, scale), sampler, noise, condition, fresh)


CASES: dict[str, Callable[[NetworkDenoiser], NetworkDenoiser]] = {
    "span": lambda one: trained(two_time(one), ".second."),
    "guidance": lambda one: trained(with_guidance_input(one, SCALES), ".second."),
    "both": lambda one: trained(with_guidance_input(two_time(one), SCALES), ".second."),
    "adapters": lambda one: with_inside(one, "adapters"),
    "guide": lambda one: with_inside(one, "guide"),
    "adapters and span": lambda one: trained(two_time(with_inside(one, "adapters")), ".second."),
    "lora": lora,
}


USUAL = [("vp", "span"), ("flow", "adapters and span"), ("vp", "guidance")]
ALL = [(name, case) for name in ("vp", "flow", "dit") for case in CASES]


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(*one, marks=[] if one in USUAL else pytest.mark.slow) for one in ALL]
)
def test_an_opened_export_is_the_student_at_any_steps_and_scale(cosine, teachers, tmp_path, name, case):
    plain = {"vp": lambda: pixels(cosine), "flow": lambda: pixels(Flow(3.0), Kind.VELOCITY),
             "dit": lambda: teachers("dit").denoiser.copy()}[name]()  # fmt: skip
    folder, shape = (teachers("dit").folder, (4, 8, 8)) if name == "dit" else (None, (3, 8, 8))
    student = CASES[case](plain)
    kind = "flow_map" if "span" in student.graft.names else "ddim"
    sampler = Sampler.of(student.process, 2, kind)
    again = leave(student, sampler, tmp_path / "out", teacher=folder)
    assert (set(again.graft.names), again.guidance_range) == (set(student.graft.names), student.guidance_range)
    assert again.process.step_list(3) == student.process.step_list(3)
    assert read_manifest(tmp_path / "out").sampler == sampler
    # Adapters are added to the weights, and an ε-network's x̂_0 is rounded 157 times coarser at the first step.
    near = 0.0 if case != "lora" else 2e-3 if name == "dit" else 1e-5
    for steps in (2, 3):
        on = Sampler.of(student.process, steps, kind)
        for scale in (None,) if student.guidance_range is None else (None, 1.5):
            wanted = samples(student, on, scale, shape)
            torch.testing.assert_close(samples(again, on, scale, shape), wanted, rtol=0, atol=near)
    if student.guidance_range is not None:
        assert float((samples(again, sampler, 1.0, shape) - samples(again, sampler, 5.0, shape)).abs().max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_prompts_are_drawn_from_an_export_as_from_its_pipeline(tmp_path, name):
    """Its own classes, an input of diffusers' own class, and one that is added to it."""
    folder = tiny_pipelines.saved(name, tmp_path)
    student = trained(with_guidance_input(load_denoiser(str(folder)), SCALES), ".second.", "cond_proj", "guidance_emb")
    sampler = Sampler.of(student.process, 2, "ddim")
    export_student(student, sampler, folder, tmp_path / "out", replace(GUIDED, teacher=str(folder)))
    again = load_denoiser(str(tmp_path / "out"))
    assert again.guidance_range == SCALES
    told = tiny_pipelines.call(name)
    source = open_any(str(tmp_path / "out"), 2.5, side=told["height"])
    noise, prompt = (
        torch.randn(1, *source.shape, generator=torch.Generator().manual_seed(3)),
        source.of_prompts(["a fox"]),
    )
    *_, made = source.predictions(source.sampler, noise, prompt, 0)
    assert source.encoder is not None
    own = with_guidance(prompt, torch.tensor([2.5]), student)
    with torch.no_grad():
        wanted = source.encoder.images(sample(student.sized(source.shape), sampler, noise, own))
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param("sd15"), pytest.param("sd3", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_file_of_adapters_is_opened_on_the_pipeline_that_it_is_for(teachers, tmp_path, name):
    teacher = Student(load_denoiser(str(teachers(name).folder)), teachers(name).folder)
    teacher.denoiser.adapters.convolutions = name == "sd15"
    view = trained(teacher.denoiser.lora_view("student", 4), ".lora_")
    sampler = Sampler.of(view.process, 2)
    facts = replace(FEW_STEP, teacher=str(teacher.folder))
    export_student(view, sampler, teacher.folder, tmp_path / "out", facts, Form(lora=True))
    again = load_denoiser(str(tmp_path / "out"))
    assert not again.adapters.names
    words = tiny.inputs(again.network)
    with torch.no_grad():
        view.adapters.activate("student")
        wanted = view.network(**words, return_dict=False)[0]
        torch.testing.assert_close(again.network(**words, return_dict=False)[0], wanted, rtol=0, atol=1e-5)
        view.adapters.activate("base")
        assert float((view.network(**words, return_dict=False)[0] - wanted).abs().max()) > 1e-3
    if name == "sd15":  # the other has no text encoders
        assert open_any(str(tmp_path / "out"), side=16).sampler == sampler
    edit_json(tmp_path / "out" / "fewstep.json", base="nowhere")
    with pytest.raises(UserError, match="adapters for 'nowhere', which is no folder, embedded teacher or hub name"):
        load_denoiser(str(tmp_path / "out"))


class Room:
    """A teacher, pictures and runs, in one folder."""

    def __init__(self, folder: Path, process: VP) -> None:
        self.folder, self.images = folder, write_images(folder / "images")
        self.plain = pixels(process)
        self.teacher = self.left("teacher", self.plain, GUIDED)

    def left(self, name: str, student: NetworkDenoiser, facts: CardFacts, kind: Any = "ddim") -> Path:
        export_student(student, Sampler.of(student.process, 2, kind), None, self.folder / name, facts)
        return self.folder / name

    def config(self, method: str, *, teacher: Path | None = None, **more: Any) -> dict[str, Any]:
        values = {
            "run": {"dir": str(self.folder / "run")},
            "teacher": {"path": str(teacher or self.teacher)},
            "method": {"name": method},
            "data": {"name": "folder", "path": str(self.images), "size": 8, "batch_size": 4},
            "train": {"steps": 2, "threads": 1, "sample_every": 0, "checkpoint_every": 2},
        }
        for key, value in more.items():
            section, _, field = key.partition("__")
            values.setdefault(section, {})[field] = value
        return values

    def method(self, name: str, **more: Any) -> Any:
        config = parse(self.config(name, **more))
        return build_method(config, open_sources(config))

    def mistake(self, name: str, **more: Any) -> str:
        with pytest.raises(UserError) as told:
            self.method(name, **more)
        (line,) = str(told.value).splitlines()
        return line.replace(str(self.folder), "DIR")


@pytest.fixture
def room(tmp_path, cosine) -> Room:
    return Room(tmp_path, cosine)


LABELS = Condition.of_labels(torch.tensor([0, 2, 3]))
T = torch.tensor([100.0, 500.0, 999.0])


def said(denoiser: Any, x: Tensor, condition: Condition = LABELS) -> Tensor:
    with torch.no_grad():
        return denoiser(x, T, condition).value


@pytest.mark.parametrize("kind", ["guidance", "adapters", "guide"])
def test_a_student_of_guidance_teaches_with_one_evaluation_at_the_runs_scale(room, kind):
    made = CASES[kind](room.plain)
    export = room.left("guided", made, GUIDED)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = {s: said(made, x, with_guidance(LABELS, torch.full((3,), s), made)) for s in (1.0, 3.0)}
    method = room.method("consistency", teacher=export, teacher__guidance=3.0, teacher__guidance_interval=[0.3, 0.7])
    teacher, rows = method.critics.teacher, []
    teacher.denoiser.network.register_forward_pre_hook(lambda _n, a, k: rows.append(k or a), with_kwargs=True)
    told = said(teacher, x)
    assert len(rows) == 1
    assert torch.equal(told[1], wanted[3.0][1]), "inside the interval"
    assert torch.equal(told[[0, 2]], wanted[1.0][[0, 2]]), "outside"
    assert torch.equal(said(teacher.denoiser, x), wanted[3.0])
    assert torch.equal(said(method.student, x), wanted[3.0]), "the student starts as the teacher at that scale"
    assert method.student.guidance_range == (3.0, 3.0)
    each = torch.tensor([1.0, 2.0, 5.0])
    assert torch.equal(said(teacher.at(each), x)[1], said(made, x, with_guidance(LABELS, each, made))[1])


def test_a_method_with_a_range_goes_on_with_the_teachers_input(room):
    made = CASES["guidance"](room.plain)
    export = room.left("guided", made, GUIDED)
    method = room.method("guidance", teacher=export, method__guidance_range=[2.0, 4.0])
    x, scale = torch.randn(3, 3, 8, 8), torch.tensor([2.0, 3.0, 4.0])
    told = with_guidance(LABELS, scale, made)
    assert torch.equal(said(method.student, x, told), said(made, x, told))
    assert (method.student.graft.names, method.student.guidance_range) == (("guidance",), (2.0, 4.0))
    assert torch.equal(said(method.guided.at(scale), x), said(made, x, told))


@pytest.mark.parametrize("name", ["flux_guidance", pytest.param("sd15", marks=pytest.mark.slow)])
def test_an_input_of_the_networks_own_class_is_told_the_runs_scale(tmp_path, name):
    """FLUX.1-dev's embedding, and an export whose UNet has LCM's: their manifest alone tells the range."""
    folder = tiny_pipelines.saved(name, tmp_path)
    if name == "sd15":
        ranged = trained(with_guidance_input(load_denoiser(str(folder)), SCALES), "cond_proj")
        folder, pipeline = tmp_path / "out", folder
        export_student(ranged, Sampler.of(ranged.process, 2, "ddim"), pipeline, folder, GUIDED)
    plain = load_denoiser(str(folder))
    call = {"height": 32, "width": 32, **tiny_pipelines.facts(name)}
    prompts = Capture(tiny_pipelines.build(name), call).prompts(["a fox", "a cat"])
    channels = cast(Any, plain.network).config["in_channels"]
    shape = (channels, 8, 8) if name == "sd15" else (len(prompts.shared["img_ids"]), channels)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    t = plain.process.times(plain.process.t_max / 2, x)
    wanted = plain(x, t, with_guidance(prompts, torch.full((len(x),), 2.5), plain)).value
    config = Teacher(path=str(folder), guidance=2.5)
    teacher = open_teacher(config, "cpu")
    assert teacher is not None
    student = at_one_scale(teacher.copy(), config)
    guided = guided_teacher(config, Sources(cast(Any, None), teacher, student))
    assert guided is not None
    for one in (guided, teacher, student):
        assert torch.equal(one(x, t, prompts).value, wanted)
    assert student.guidance_range == (2.5, 2.5)
    sampled = open_any(str(folder), 2.5, 32).denoiser  # by a command, as `--beside-teacher`
    assert torch.equal(sampled(x, t, prompts).value, wanted)
    usual = open_teacher(Teacher(path=str(folder)), "cpu")
    assert usual is not None
    assert torch.equal(usual(x, t, prompts).value, plain(x, t, prompts).value) == (name == "flux_guidance")


@pytest.mark.parametrize(("method", "kind"), [("agd", "adapters"), ("plug_and_play", "guide")])
def test_what_a_run_left_inside_a_network_is_trained_on(room, method, kind):
    made = CASES[kind](room.plain)
    export = room.left("guided", made, GUIDED)
    more = {"student__path": str(export), "method__guidance_range": list(SCALES), "teacher__guidance": 1.0}
    student = room.method(method, **more).student
    x, told = torch.randn(3, 3, 8, 8), with_guidance(LABELS, torch.tensor([1.0, 3.0, 4.0]), made)
    assert torch.equal(said(student, x, told), said(made, x, told))
    wrong = {**more, "method__guidance_range": [1.0, 3.0]}
    assert room.mistake(method, **wrong) == ("method.guidance_range: [1.0, 3.0] given; what the student has in its "
                                             "network was made for [1.0, 5.0]")  # fmt: skip


def test_a_two_time_student_is_trained_on_by_a_method_that_tells_its_spans(room):
    made = CASES["span"](room.plain)
    export = room.left("jumps", made, FEW_STEP, "flow_map")
    method = room.method("flow_map", student__path=str(export))
    x, told = torch.randn(3, 3, 8, 8), LABELS.with_scalar("span", torch.tensor([0.1, 0.4, 0.8]))
    assert torch.equal(said(method.student, x, told), said(made, x, told))
    assert method.student.graft.names == ("span",)


def test_what_makes_no_sense_is_refused_in_one_line(room):
    jumps = room.left("jumps", CASES["span"](room.plain), FEW_STEP, "flow_map")
    few = room.left("few", room.plain, replace(FEW_STEP, method="dmd2"))
    ranged = room.left("ranged", CASES["guidance"](room.plain), GUIDED)
    student = "is a few-step student, right at its own steps alone; a pretrained network, or a student of reflow or of "
    student += "guidance distillation, can teach (student.path trains a student on)"
    for told, wrong in [
        (f"teacher.path: DIR/jumps {student}", {"teacher": jumps}),
        (f"teacher.path: DIR/few {student}", {"teacher": few}),
        ("teacher.guidance: 7.0 given; DIR/ranged takes scales from 1 to 5",
         {"teacher": ranged, "teacher__guidance": 7.0}),
        ("teacher.guidance: (2.0, 6.0) given; DIR/ranged takes scales from 1 to 5",
         {"teacher": ranged, "teacher__guidance": [2.0, 6.0]}),
        ("teacher.negative: given, but DIR/ranged takes its guidance scale as an input, and nothing that it leads away "
         "from; leave it out", {"teacher": ranged, "teacher__guidance": 2.0, "teacher__negative": 1}),
        ("teacher.guidance: 2.0 given; DIR/teacher has its guidance built in and takes 1 only",
         {"teacher__guidance": 2.0}),
        ("teacher.weak: DIR/ranged has an input (guidance) that nothing would tell it; a network without is needed",
         {"teacher__weak": str(ranged), "teacher__guidance": 1.0}),
        ("student.path: a two-time student is told where its jumps end, and consistency does not tell it; train it on "
         "by flow_map or meanflow, or start from another", {"student__path": str(jumps)}),
        ("method.guidance_range: [1, 8] given; the teacher takes scales from 1 to 5",
         {"teacher": ranged, "method__guidance_range": [1.0, 8.0]}),
    ]:  # fmt: skip
        assert room.mistake("consistency", **wrong) == told
    assert room.mistake("agd", teacher=ranged, method__guidance_range=[1.0, 4.0]) == (
        "student: its network has an input (guidance) already; the method adds guidance to one without"
    )
    assert room.mistake("agd", teacher=ranged) == (
        "method.guidance_range: [1, 6] given; the teacher takes scales from 1 to 5")  # fmt: skip


@pytest.mark.parametrize("case", ["adapters and span", "guidance"])
def test_a_dry_run_needs_no_weights(room, case):
    export = room.left("guided", CASES[case](room.plain), GUIDED, "flow_map" if "span" in case else "ddim")
    hollow = load_denoiser(str(export), "meta")
    whole = load_denoiser(str(export))
    assert {n: p.shape for n, p in hollow.network.named_parameters()} == {
        n: p.shape for n, p in whole.network.named_parameters()
    }
    assert all(p.is_meta for p in hollow.network.parameters())
    assert (hollow.graft.names, hollow.guidance_range) == (whole.graft.names, SCALES)


def test_damage_is_told_in_one_line(room):
    jumps = room.left("jumps", CASES["span"](room.plain), FEW_STEP, "flow_map")
    config = jumps / "unet" / "config.json"
    good = json.loads(config.read_text())
    edit_json(config, fewstep={**good["fewstep"], "inputs": {"span": 10.0, "other": 1.0}})
    with pytest.raises(UserError, match=r"jumps/unet: the weights cannot be read: .*second\.other.* is missing"):
        load_denoiser(str(jumps))
    edit_json(config, fewstep={**good["fewstep"], "inputs": {}})
    with pytest.raises(UserError, match=r"safetensors: the weights cannot be read: fewstep_inputs.* is not of this"):
        load_denoiser(str(jumps))
    edit_json(config, fewstep={**good["fewstep"], "injection": {"kind": "guide"}})
    with pytest.raises(UserError, match=r"config.json: what it says of added inputs is damaged; export again"):
        load_denoiser(str(jumps))
    edit_json(config, fewstep={**good["fewstep"], "guidance_range": [1.0]})
    with pytest.raises(UserError, match=r"config.json: what it says of added inputs is damaged; export again"):
        load_denoiser(str(jumps))
    edit_json(jumps / "fewstep.json", adapters="../elsewhere.safetensors")
    with pytest.raises(UserError, match=r"fewstep.json: missing or damaged; export the run again"):
        load_denoiser(str(jumps))
    (jumps / "fewstep.json").write_text("{")
    with pytest.raises(UserError, match=r"fewstep.json: missing or damaged; export the run again"):
        load_denoiser(str(jumps))


def images_of(source: Source, steps: int) -> Tensor:
    noise = torch.randn(2, *source.shape, generator=torch.Generator().manual_seed(1))
    return source.images(source.sampler_in(steps), noise, Condition.of_labels(torch.tensor([0, 2])), 5)


@pytest.mark.parametrize("lora", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_commands_open_an_export_as_they_open_its_run(room, lora):
    """A two-time run, its export, and diffusers' pipeline of that: the same samples."""
    text = room.folder / "run.yaml"
    text.write_text(json.dumps(room.config("meanflow", student__steps=2, student__lora=lora)))
    trained = call("train", str(text))
    assert trained.code == 0, trained.err
    out = room.folder / "out"
    done = call("export", str(room.folder / "run"), str(out), "--no-verify")
    assert done.code == 0, done.err
    run, export = open_source(str(room.folder / "run")), open_source(str(out))
    assert run.sampler == export.sampler
    assert not read_manifest(out).teaches
    for steps in (2, 3):
        torch.testing.assert_close(images_of(export, steps), images_of(run, steps), rtol=0, atol=1e-5)
    drawn = call("sample", str(out), "--steps", "1", "--steps", "2", "--classes", "1", "--beside-teacher",
                 "--out", str(room.folder / "grid.png"))  # fmt: skip
    assert drawn.code == 0, drawn.err
    assert [line.split(":")[0] for line in drawn.out.splitlines()][:3] == ["student, 1 step", "student, 2 steps",
                                                                          "teacher, 1 step"]  # fmt: skip
    wrong = call("sample", str(out), "--guidance", "3", "--out", str(room.folder / "grid.png"))
    assert "guidance: 3.0 given; a few-step student has it built in and takes 1 only" in wrong.err


LATER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "halved": ("progressive", "adapters", {"method__start_steps": 4}),
    "mapped": ("flow_map", "adapters", {}),
    "adapted": ("dmd2", "guidance", {"student__lora": 2, "method__fake_score_lora": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_student_of_a_guidance_distilled_teacher_leaves_and_opens(room, name):
    """Trained in one evaluation a step at one scale, which its file keeps."""
    method, kind, more = LATER[name]
    export = room.left("guided", CASES[kind](room.plain), GUIDED)
    config = room.config(method, teacher=export, teacher__guidance=3.0, optim__lr=1e-3, **more)
    (room.folder / "run.yaml").write_text(json.dumps(config))
    trained = call("train", str(room.folder / "run.yaml"))
    assert trained.code == 0, trained.err
    place, out = str(room.folder / "run"), str(room.folder / "out")
    done = call("export", place, out)
    assert done.code == 0, done.err + done.out
    assert "reloaded in a fresh process, samples differ by at most" in done.out
    torch.testing.assert_close(images_of(open_source(out), 1), images_of(open_source(place), 1), rtol=0, atol=1e-5)
    assert read_manifest(Path(out)).guidance == 3.0
    wrong = call("sample", place, "--guidance", "2", "--out", "x.png")
    assert "this student was trained for scales from 3 to 3" in wrong.err


@pytest.mark.slow
def test_a_report_and_figures_of_an_export(room, cosine):
    student = with_guidance_input(make_denoiser(tiny.alive(tiny.unet2d_classes(32, 24, 3)), Schedule(cosine, Kind.V)),
                                  SCALES)  # fmt: skip
    config = room.config("guidance", student__steps=2)
    config["data"], config["teacher"] = {"name": "emoji32"}, {"path": "emoji32"}
    facts = replace(GUIDED, config=parse(config).model_dump(mode="json"))
    export = str(room.left("guided", trained(student, ".second."), facts))
    told = call("evaluate", export, "--samples", "8", "--steps", "2", "--guidance", "2")
    assert told.code == 0, told.err
    refused = call("evaluate", export, "--samples", "8", "--guidance", "9")
    assert "guidance: 9 given; this student was trained for scales from 1 to 5" in refused.err
    table = call("report", export, "--samples", "8", "--steps", "2", "--out", str(room.folder / "report"))
    assert table.code == 0, table.err
    rows = json.loads((room.folder / "report" / "report.json").read_text())["rows"]
    (row,) = [row for row in rows if row["method"] == "guidance"]
    assert (row["steps"], row["guidance"]) == (2, 3.0)
    assert row["fd"] > 0
