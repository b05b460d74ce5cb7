"""What leaves in classes of fewstep's own: two-time students, guidance as an input, flow students on fixed grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.config import Teacher
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Sampler
from fewstep.models.adapter_guidance import with_adapters
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guide_network import guide_for, with_guide
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.two_time import two_time
from fewstep.pipelines.check import allowed
from fewstep.pipelines.flow_scheduler import FlowGridScheduler
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.merge import exported_network, plain_network
from fewstep.training.starting import at_one_scale, open_teacher
from tests import tiny, tiny_pipelines
from tests.pipelines import matrix
from tests.pipelines.conftest import Student, difference

pytestmark = pytest.mark.usefixtures("here")
SCALES = (1.0, 5.0)


def trained(student: NetworkDenoiser, part: str) -> NetworkDenoiser:
    """With noise on the parameters whose names have `part` in them: they start at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in student.network.named_parameters():
        if part in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return student


def spanned(student: Student) -> Student:
    return Student(trained(two_time(student.denoiser), ".second."), student.folder)


def guided(student: Student, kind: str) -> Student:
    denoiser = student.denoiser.copy()
    x = torch.randn(1, denoiser.network.config["in_channels"], 8, 8)  # pyright: ignore
    example = Batch(x, Condition.of_labels(torch.tensor([1])), torch.zeros(1))
    if kind == "adapters":
        return Student(trained(with_adapters(denoiser, SCALES, example, 4, 8), "guidance_adapters"), student.folder)
    return Student(trained(with_guide(denoiser, guide_for(denoiser, SCALES, example, 4, 8)), "guide."), student.folder)


def flow_pixels(shift: float = 3.0) -> Student:
    return Student(make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(Flow(shift), Kind.VELOCITY)))


def sampled(out: Path, **words: Any) -> Tensor:
    """Images of the export, from one seed."""
    pipeline: Any = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **words).images


@pytest.mark.parametrize("name", ["pixels", "flow", "dit", "sd3"])
def test_a_two_time_student_makes_the_same_samples(pixels, teachers, tmp_path, name):
    plain = {"pixels": pixels, "flow": flow_pixels()}.get(name) or teachers(name)
    student = spanned(plain)
    sampler = Sampler.of(student.denoiser.process, 2, "flow_map")
    assert difference(student, sampler, tmp_path / "out") <= (1e-5 if name != "dit" else 2e-3)
    network = f"fewstep.pipelines.networks.FewStep{type(plain.denoiser.network).__name__}"
    own = read_manifest(tmp_path / "out").own
    assert own == ((network, "fewstep.pipelines.flow_scheduler.FlowGridScheduler") if name == "flow" else (network,))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
def test_a_two_time_student_of_a_teacher_that_is_told_its_guidance(tmp_path):
    """The class's own input keeps its scale beside the span, and the pipeline is told it."""
    teacher = matrix.Teacher.saved("flux_guidance", tmp_path)
    config = Teacher(path=str(teacher.folder), guidance=2.0)
    opened = open_teacher(config, "cpu")
    assert opened is not None
    student = trained(two_time(at_one_scale(opened.sized(teacher.latents.shape), config)), ".second.")
    sampler = Sampler.of(student.process, 2, "flow_map")
    assert difference(Student(student, teacher.folder), sampler, tmp_path / "out") <= 1e-5
    assert read_manifest(tmp_path / "out").call["guidance_scale"] == 2.0
    again = load_denoiser(str(tmp_path / "out"))
    assert (again.graft.names, again.guidance_range) == (("span",), (2.0, 2.0))


def test_without_its_span_the_same_student_makes_others(pixels, tmp_path):
    """The check would see a network that does not hear where its jumps end."""
    student = spanned(pixels)
    sampler = Sampler.of(student.denoiser.process, 2, "flow_map")
    assert difference(student, sampler, tmp_path / "out") <= 1e-5
    made = sampled(tmp_path / "out", class_labels=[0, 1], batch_size=2, num_inference_steps=2)
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.facts = {**pipeline.unet.facts, "spans": [0.0, 0.0]}
    words: dict[str, Any] = {"class_labels": [0, 1], "batch_size": 2, "num_inference_steps": 2, "output_type": "pt"}
    assert float((pipeline(generator=torch.Generator().manual_seed(0), **words).images - made).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["span", "adapters", "guide"])
def test_its_weights_may_visit_a_device_for_each_call(pixels, kind):
    """As `enable_model_cpu_offload` has it: they move when the network's own pass begins, after its inputs are told."""
    student = (spanned(pixels) if kind == "span" else guided(pixels, kind)).denoiser
    network = exported_network(student, Sampler.of(student.process, 2, "flow_map" if kind == "span" else "ddim"))
    cpu_offload_with_hook(network, torch.device("meta"))
    x, labels = torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    assert network(x, 999, class_labels=labels).sample.shape == x.shape


def test_other_steps_than_the_exported_are_refused(pixels, tmp_path):
    student = spanned(pixels)
    difference(student, Sampler.of(student.denoiser.process, 2, "flow_map"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"time 749 told; this network's jumps start at \[999\.0, 499\.0\]"):
        sampled(tmp_path / "out", class_labels=[0], num_inference_steps=4)


def test_a_two_time_network_survives_saving_again(pixels, tmp_path):
    student = spanned(pixels)
    difference(student, Sampler.of(student.denoiser.process, 2, "flow_map"), tmp_path / "out")
    words: dict[str, Any] = {"class_labels": [0, 1], "batch_size": 2, "num_inference_steps": 2}
    DiffusionPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert torch.equal(sampled(tmp_path / "out", **words), sampled(tmp_path / "again", **words))


@pytest.mark.parametrize("kind", ["adapters", "guide"])
@pytest.mark.parametrize("name", ["pixels", "dit"])
def test_guidance_inside_a_network_leaves_with_it(pixels, teachers, tmp_path, name, kind):
    student = guided(pixels if name == "pixels" else teachers("dit"), kind)
    sampler = Sampler.of(student.denoiser.process, 4, "ddim")
    assert difference(student, sampler, tmp_path / "out") <= (1e-5 if name == "pixels" else 2e-3)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.guidance, len(manifest.own)) == (3.0, 1)
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "out")
    network: Any = getattr(pipeline, manifest.component)
    x, t, labels = torch.randn(2, network.config.in_channels, 8, 8), torch.tensor([999.0, 500.0]), torch.tensor([0, 1])
    said = {}
    for scale in (1.5, 5.0):
        network.guidance_scale = scale
        with torch.no_grad():
            said[scale] = network(x, timestep=t.long(), class_labels=labels).sample
            told = Condition.of_labels(labels).with_scalar("guidance", torch.full((2,), scale))
            output = student.denoiser(x, t.long(), told).value
        torch.testing.assert_close(said[scale][:, : output.shape[1]], output, rtol=0, atol=5e-6)
    assert float((said[1.5] - said[5.0]).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["renoise", "ddim"])
@pytest.mark.parametrize("steps", [1, 3])
def test_flow_with_classes_leaves_on_a_fixed_grid(tmp_path, steps, kind):
    student = flow_pixels()
    sampler = Sampler.of(student.denoiser.process, steps, kind)
    assert difference(student, sampler, tmp_path / "out") <= 1e-5
    manifest = read_manifest(tmp_path / "out")
    assert manifest.own == ("fewstep.pipelines.flow_scheduler.FlowGridScheduler",)
    assert manifest.call == {"num_inference_steps": steps}
    with pytest.raises(ValueError, match=f"num_inference_steps: 8 given; this student was made for {steps}, at"):
        sampled(tmp_path / "out", class_labels=[0], num_inference_steps=8)


def test_the_grid_is_the_configs_whatever_the_pipeline_says():
    scheduler = FlowGridScheduler(sigmas=[1.0, 0.9, 0.5])
    told: list[dict[str, Any]] = [{}, {"num_inference_steps": 3}, {"sigmas": [1.0, 0.5, 0.1], "mu": 1.15}]
    for words in [*told, {"timesteps": [9, 8, 7]}]:
        scheduler.set_timesteps(**words)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 900.0, 500.0]))
    with pytest.raises(ValueError, match=r"num_inference_steps: 2 given; this student was made for 3"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
    for wrong in ([], [1.0, 1.0], [0.5, 0.9], [1.5, 1.0], [1.0, -0.1]):
        with pytest.raises(ValueError, match="numbers that fall, from 1 down to 0, are needed"):
            FlowGridScheduler(sigmas=wrong)


def run_of(scheduler: Any, velocity: Callable[[Tensor], Tensor], noise: Tensor, **words: Any) -> Tensor:
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x), t, x, **words).prev_sample
    return x


@pytest.mark.parametrize("renoise", [False, True])
def test_the_steps_are_those_of_diffusers_own_scheduler(renoise):
    """Which takes the same list as an argument; and draws from torch's global generator."""
    times, noise = [1.0, 0.9, 0.75, 0.5], torch.randn(2, 3, 4, 4)
    its, ours = FlowMatchEulerDiscreteScheduler(stochastic_sampling=renoise), FlowGridScheduler(times, renoise)
    its.set_timesteps(sigmas=times)
    ours.set_timesteps(4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = run_of(its, torch.sin, noise)
    made = run_of(ours, torch.sin, noise, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-5)


def test_noise_without_a_generator_is_the_same_every_time_until_reseeded():
    scheduler, noise = FlowGridScheduler([1.0, 0.5], renoise=True), torch.randn(2, 3, 4, 4)
    made = []
    for seed in (None, None, 1, 0):
        if seed is not None:
            scheduler.manual_seed(seed)
        scheduler.set_timesteps(2)
        made.append(run_of(scheduler, torch.cos, noise))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[3])
    assert not torch.equal(made[0], made[2])


def test_half_precision_is_rounded_only_between_the_steps():
    scheduler, x = FlowGridScheduler([0.7, 0.3]), torch.randn(2, 3, 4, 4)
    velocity = torch.randn(2, 3, 4, 4)
    made = scheduler.step(velocity.bfloat16(), 700.0, x.bfloat16(), return_dict=False)[0]
    exact = x.bfloat16().float() - 0.4 * velocity.bfloat16().float()
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, exact.bfloat16(), rtol=0, atol=0)


def test_inputs_of_other_views_do_not_leave(tmp_path, cosine):
    """A fake score on the same network hears the student's step; the student's file knows nothing of it."""
    teacher = make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(cosine, Kind.V))
    student = teacher.lora_view("student", 2)
    trained(student, ".lora_")
    fake = teacher.lora_view("fake_score", 2).with_scalar("step")
    trained(fake, ".second.")
    assert set(plain_network(student).state_dict()) == set(tiny.unet2d_classes().state_dict())
    assert difference(Student(student), Sampler.of(cosine, 4), tmp_path / "out") <= 1e-5
    assert read_manifest(tmp_path / "out").scheduler.endswith(".LCMScheduler")
    assert DDIMScheduler.__name__ not in read_manifest(tmp_path / "out").scheduler


QUICK = ("flux",)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in tiny_pipelines.PIPELINES]
)
def test_guidance_adapters_leave_inside_a_network_of_every_family(tmp_path, name):
    teacher = matrix.Teacher.saved(name, tmp_path)
    shape, condition = teacher.latents.shape, teacher.latents.condition.rows(slice(0, 1))
    example, denoiser = Batch(torch.randn(1, *shape), condition, torch.zeros(1)), load_denoiser(str(teacher.folder))
    denoiser = denoiser.sized(shape)
    student = trained(with_adapters(denoiser, SCALES, example, 4, 8), "guidance_adapters")
    sampler = Sampler.of(student.process, 2, "ddim")
    assert difference(Student(student, teacher.folder), sampler, tmp_path / "out") <= allowed(student, sampler)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.guidance, f"FewStep{type(student.network).__name__}" in str(manifest.own)) == (3.0, True)
