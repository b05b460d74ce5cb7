"""fewstep's own schedulers: steps that no scheduler of diffusers keeps, and the same ones where one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    Flux2Pipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
)
from torch import Tensor

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP
from fewstep.diffusion.solvers import Sampler
from fewstep.models.load import load_denoiser, make_denoiser
from fewstep.models.schedule import Preconditioning, Schedule, alphas_cumprod, schedule_of
from fewstep.pipelines.check import allowed
from fewstep.pipelines.edm_scheduler import EDMGridScheduler
from fewstep.pipelines.manifest import read_manifest
from fewstep.pipelines.schedulers import contract_of
from fewstep.pipelines.vp_scheduler import VPGridScheduler
from tests import tiny, tiny_pipelines
from tests.pipelines.conftest import Student, difference

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # numpy, of diffusers
]
OWN = "fewstep.pipelines.vp_scheduler.VPGridScheduler"
OWN_EDM = "fewstep.pipelines.edm_scheduler.EDMGridScheduler"
OWN_SCM = "fewstep.pipelines.scm_scheduler.SCMGridScheduler"
STOCK_EDM = "diffusers.schedulers.scheduling_edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler"
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Student]:
    root = tmp_path_factory.mktemp("pipelines")

    def student(name: str) -> Student:
        folder = root / name if (root / name).exists() else tiny_pipelines.saved(name, root)
        denoiser = load_denoiser(str(folder))
        return Student(denoiser.sized((4, 16)) if name == "qwen" else denoiser, folder)

    return student


SIBLINGS: list[tuple[str, str, Sampler, str | None]] = [
    ("sprint", "SanaSprintPipeline", Sampler((1.0,)), None),
    ("sprint", "SanaSprintPipeline", Sampler((1.0, 0.7)), None),
    ("sprint", "SanaSprintPipeline", Sampler((1.0, 0.7, 0.2)), OWN_SCM),
    ("sprint", "SanaSprintPipeline", Sampler((1.0, 0.5), "ddim"), OWN_SCM),
    ("alpha", "PixArtAlphaPipeline", Sampler((999.0, 666.0)), None),
    ("flux2", "Flux2Pipeline", Sampler((1.0, 0.9, 0.5)), None),
]


def sibling(name: str) -> DiffusionPipeline:
    """A pipeline of a known family beside that which `tiny_pipelines` has."""
    if name == "sprint":
        return tiny_pipelines.sana_sprint()
    made: Any = tiny_pipelines.pixart() if name == "alpha" else tiny_pipelines.flux2_klein()
    parts: dict[str, Any] = {part: made.components[part] for part in ("vae", "transformer", "scheduler")}
    if name == "alpha":
        return PixArtAlphaPipeline(tokenizer=made.tokenizer, text_encoder=made.text_encoder, **parts)
    network = type(made.transformer).from_config(made.transformer.config, guidance_embeds=True)
    nothing: Any = None
    return Flux2Pipeline(tokenizer=nothing, text_encoder=nothing, **{**parts, "transformer": network})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pipeline", "sampler", "scheduler"), SIBLINGS)
def test_pipelines_beside_them_make_the_same_samples(tmp_path, name, pipeline, sampler, scheduler):
    folder, out = tmp_path / "teacher", tmp_path / "out"
    tiny_pipelines.settled(lambda: sibling(name)).save_pretrained(folder)
    student = Student(load_denoiser(str(folder)), folder)
    assert difference(student, sampler, out) <= allowed(student.denoiser, sampler)
    manifest = read_manifest(out)
    assert (manifest.pipeline, manifest.own) == (pipeline, (scheduler,) if scheduler else ())


def run_of(scheduler: Any, network: Callable[[Tensor], Tensor], noise: Tensor, **words: Any) -> Tensor:
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, **words).prev_sample
    return x


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NOISE = torch.randn(2, 3, 4, 4, generator=seeded(7))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("renoise", [False, True])
def test_on_a_table_the_steps_are_diffusers(kind, renoise):
    words: dict[str, Any] = {**SD, "prediction_type": kind}
    if renoise:
        its: Any = LCMScheduler(**words, original_inference_steps=1000, timestep_scaling=1e4)
    else:
        its = DDIMScheduler(**words, clip_sample=False, timestep_spacing="trailing")
    its.set_timesteps(4)
    ours = VPGridScheduler([999, 749, 499, 249], renoise, **words)
    assert ours.timesteps.tolist() == its.timesteps.tolist()
    told, ours_told = ({"generator": seeded()} for _ in range(2))
    one = run_of(its, lambda x: 0.3 * x, NOISE, **told)
    torch.testing.assert_close(run_of(ours, lambda x: 0.3 * x, NOISE, **ours_told), one, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_s_steps_are_diffusers(kind):
    its: Any = EDMEulerScheduler(prediction_type=kind, sigma_data=1.0, sigma_max=14.0)
    its.set_timesteps(4)
    ours = EDMGridScheduler(its.sigmas[:-1].tolist(), prediction_type=kind, sigma_data=1.0, sigma_max=14.0)
    torch.testing.assert_close(ours.timesteps, its.timesteps, rtol=1e-6, atol=1e-6)
    start = NOISE * 14 / its.init_noise_sigma
    one = run_of(its, lambda x: 0.3 * x, start)
    two = run_of(ours, lambda x: 0.3 * x, NOISE)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda **words: VPGridScheduler([999.0, 400.5], **words), lambda **words: EDMGridScheduler([80.0, 2.0], **words)],
    ids=["table", "edm"],
)
def test_fresh_noise_comes_from_the_generator_or_from_the_scheduler_s_own_seed(make):
    scheduler = make(renoise=True)

    def once(seed: int | None = None, **words: Any) -> Tensor:
        if seed is not None:
            scheduler.manual_seed(seed)
        scheduler.set_timesteps(2)
        return run_of(scheduler, lambda x: 0.1 * x, NOISE, **words)

    first = once()
    assert torch.equal(once(), first), "every sampling begins with the seed"
    assert torch.equal(once(generator=seeded()), first), "the seed is 0"
    assert float((once(seed=1) - first).abs().max()) > 1e-3
    assert torch.equal(once(generator=seeded(1)), once())


def test_the_steps_are_the_configs_whatever_the_pipeline_says(tmp_path):
    made: list[Any] = [VPGridScheduler([999, 500.5, 3]), EDMGridScheduler([80.0, 2.0, 0.5], rho=5.0)]
    for scheduler in made:
        scheduler.save_pretrained(tmp_path)
        again = type(scheduler).from_pretrained(tmp_path)
        assert torch.equal(again.timesteps, scheduler.timesteps)
        calls: list[dict[str, Any]] = [
            {},
            {"num_inference_steps": 3},
            {"timesteps": [9, 8, 7]},
            {"sigmas": [1.0, 0.5, 0.1]},
        ]
        for told in calls:
            scheduler.set_timesteps(**told)
            assert torch.equal(scheduler.timesteps, again.timesteps)
        with pytest.raises(ValueError, match=r"num_inference_steps: 2 given; this student was made for 3, at"):
            scheduler.set_timesteps(2)
    for wrong in ([], [999, 999], [3, 500], [1000, 3], [3, -1]):
        with pytest.raises(ValueError, match="numbers that fall, from 999 down to 0"):
            VPGridScheduler(wrong)
    for wrong in ([81.0], [1.0, 0.001]):
        with pytest.raises(ValueError, match=r"numbers that fall, from 80 down to 0\.002"):
            EDMGridScheduler(wrong)


def test_what_a_network_lives_on_can_be_read_from_their_configs():
    words: dict[str, Any] = {**SD, "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
    table = VPGridScheduler(prediction_type="v_prediction", **words)
    found = schedule_of({**table.config, "_class_name": "VPGridScheduler"})
    assert isinstance(found.process, VP)
    assert torch.equal(found.process.alphas_cumprod, alphas_cumprod(words).double())
    edm = EDMGridScheduler([14.0], sigma_max=14.0, sigma_data=1.0, rho=5.0, prediction_type="v_prediction")
    assert schedule_of({**edm.config, "_class_name": "EDMGridScheduler"}) == Schedule(
        EDM(0.002, 14.0, 5.0), Kind.X0, Preconditioning(1.0, "v_prediction")
    )


@pytest.mark.parametrize(
    ("name", "sampler", "scheduler"),
    [
        ("dit", Sampler((999.0, 666.0, 332.0)), OWN),
        pytest.param("dit", Sampler((999.0, 600.5, 250.25), "ddim"), OWN, marks=pytest.mark.slow),
        pytest.param("playground", Sampler((80.0,)), STOCK_EDM, marks=pytest.mark.slow),
        ("playground", Sampler.of(EDM(), 4, "ddim"), STOCK_EDM),
        ("playground", Sampler.of(EDM(), 4), OWN_EDM),
        pytest.param("playground", Sampler((80.0, 5.0, 0.5), "euler"), OWN_EDM, marks=pytest.mark.slow),
        pytest.param(
            "cogvideox",
            Sampler((999.0, 499.0)),
            "diffusers.schedulers.scheduling_lcm.LCMScheduler",
            marks=pytest.mark.slow,
        ),
        ("cogvideox", Sampler((999.0, 666.0, 332.0), "ddim"), OWN),
        ("qwen", Sampler((1.0, 0.9, 0.5)), None),
    ],
)
def test_the_teacher_s_pipeline_makes_the_same_samples(saved, tmp_path, name, sampler, scheduler):
    student = saved(name)
    out = tmp_path / "out"
    assert difference(student, sampler, out) <= allowed(student.denoiser, sampler)
    manifest = read_manifest(out)
    assert scheduler in (manifest.scheduler, None)
    assert manifest.own == ((manifest.scheduler,) if manifest.scheduler in (OWN, OWN_EDM) else ())
    told = (out / "README.md").read_text()
    assert ("Loads where fewstep is installed" in told) is bool(manifest.own)
    assert ("pipeline.scheduler.manual_seed(1)" in told) is (name == "dit" and sampler.kind == "renoise")


@pytest.mark.parametrize(
    "sampler", [Sampler((999.0, 700.5)), Sampler((998.5, 333.3, 0.0), "ddim")], ids=lambda one: one.kind
)
def test_pixels_leave_at_times_between_the_table_s_entries(pixels, tmp_path, sampler):
    assert difference(pixels, sampler, tmp_path / "out") <= 1e-5
    assert read_manifest(tmp_path / "out").own == (OWN,)


@pytest.mark.parametrize(("steps", "kind"), [(1, "renoise"), (3, "renoise"), (3, "ddim")])
def test_pixels_with_edm_s_preconditioning(tmp_path, steps, kind):
    """And the pipeline starts from noise as large as the student's."""
    schedule = Schedule(EDM(), Kind.X0, Preconditioning(0.5, "epsilon"))
    student = Student(make_denoiser(tiny.alive(tiny.unet2d_classes()), schedule))
    sampler = Sampler.of(EDM(), steps, kind)
    assert difference(student, sampler, tmp_path / "out") <= 1e-5
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.init_noise_sigma == pytest.approx(80, rel=1e-4)
    again = load_denoiser(str(tmp_path / "out"))
    assert Schedule(again.process, again.kind, again.preconditioning) == schedule


def test_a_table_that_ends_at_pure_noise_keeps_its_end(tmp_path):
    """DPM-Solver++ would put another last entry in its place."""
    process = VP(alphas_cumprod({**SD, "rescale_betas_zero_snr": True}))
    student = Student(make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(process, Kind.V)))
    assert difference(student, Sampler.of(process, 3, "ddim"), tmp_path / "out") <= 1e-5
    assert read_manifest(tmp_path / "out").own == (OWN,)


@pytest.mark.parametrize("kind", ["renoise", "ddim"])
def test_a_transformer_of_pixels_leaves_with_what_stands_for_a_vae(cosine, tmp_path, kind):
    """And so does the student that it teaches."""
    network: Any = DiTTransformer2DModel(sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=3, out_channels=3, num_embeds_ada_norm=4)  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    student = Student(make_denoiser(tiny.alive(network), Schedule(cosine, Kind.V)))
    sampler = Sampler.of(cosine, 4, kind)
    assert difference(student, sampler, first) <= 1e-5
    assert read_manifest(first).own == ("fewstep.pipelines.pixel_vae.PixelVAE",)
    assert "import fewstep.pipelines.pixel_vae\n" in (first / "README.md").read_text()
    taught = Student(load_denoiser(str(first)), first)
    assert difference(taught, sampler, second) <= 1e-5
    pipeline: Any = DiffusionPipeline.from_pretrained(second)
    images = pipeline([0, 1], guidance_scale=1.0, generator=seeded(), num_inference_steps=4, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert float(images.std()) > 0.05


def test_exported_words_of_a_table_stay_the_teacher_s(cosine):
    contract = contract_of(Schedule(cosine, Kind.V), Sampler((999.0, 0.5)), {"beta_schedule": "squaredcos_cap_v2"})
    assert contract.by_number
    config = contract.scheduler.config
    assert (config["beta_schedule"], config["trained_betas"]) == ("squaredcos_cap_v2", None)
