"""What every family states about its networks, checked on the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.capture import captured, denoiser_of
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import FAMILIES
from fewstep.models.graft import GraftedEmbedding
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, schedule_of
from fewstep.models.taps import block_names
from tests import tiny, tiny_pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers

PROMPTS = ["a red cat", "a blue dog on a hill"]
SIDES = {"height": 32, "width": 32}


def latents_of(name: str) -> tuple[int, ...]:
    """The shape of one sample of 32 pixels, or of DiT's and DDPM's own size."""
    shapes = {"ddpm": (3, 8, 8), "dit": (4, 8, 8), "wan": (16, 1, 4, 4), "lumina2": (4, 4, 4), "qwen": (4, 16),
              "cogvideox": (1, 4, 16, 16)}  # fmt: skip
    packed = name in ("flux", "flux_guidance", "flux2_klein")
    return shapes.get(name, (64, 16) if packed else (4, 16, 16))


@dataclass(frozen=True)
class Case:
    """A denoiser, and a noisy batch of two with its condition."""

    denoiser: NetworkDenoiser
    x: Tensor
    condition: Condition

    @property
    def t(self) -> Tensor:
        return self.denoiser.process.at(torch.tensor([0.3, 0.9]))


@pytest.fixture(scope="module")
def case() -> Callable[[str], Case]:
    """The denoiser of a pipeline, with its own scheduler's process; built once."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                made[name] = _of_pipeline(name)
        return made[name]

    return get


def _of_pipeline(name: str) -> Case:
    pipeline: Any = tiny_pipelines.build(name)
    config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    denoiser = make_denoiser(denoiser_of(pipeline), schedule_of(config))
    sizes = {} if name == "dit" else SIDES
    given: Any = [1, 2] if name == "dit" else PROMPTS
    told = Condition.none() if name == "ddpm" else captured(pipeline, given, **sizes, **tiny_pipelines.facts(name))
    return Case(denoiser, torch.randn(2, *latents_of(name)), told)


NAMES = [*tiny_pipelines.PIPELINES]


def test_every_class_of_diffusers_in_the_table_has_a_case(case):
    assert {type(case(name).denoiser.network).__name__ for name in NAMES} == set(FAMILIES) - {"VectorNetwork"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flux_guidance"])
def test_a_second_time_and_a_guidance_scale_are_silent_at_first_and_then_heard(case, name):
    one = case(name)
    grown = one.denoiser.with_scalar(SPAN, 10.0).with_scalar("guidance")
    told = one.condition.with_scalar(SPAN, torch.tensor([0.2, 0.7])).with_scalar("guidance", torch.tensor([1.0, 7.0]))
    with torch.no_grad():
        before = one.denoiser(one.x, one.t, one.condition).value
        assert torch.equal(grown(one.x, one.t, told).value, before)
        for part in [m for m in grown.network.modules() if isinstance(m, GraftedEmbedding)]:
            tiny.alive(part.second, 0.3)
        other = told.with_scalar(SPAN, torch.tensor([0.2, 0.1]))
        heard, moved = (grown(one.x, one.t, c).value for c in (told, other))
        assert float((heard - before).abs().max()) > 1e-4
        assert float((heard[1] - moved[1]).abs().max()) > 1e-4
        torch.testing.assert_close(heard[0], moved[0], rtol=1e-4, atol=1e-5)
    x = one.x.clone().requires_grad_()
    tapped = one.denoiser.tapped()
    tapped(x, one.t, one.condition)
    (feature,) = tapped.features()
    assert tapped.tap is not None
    tapped.tap.remove()
    (gradient,) = torch.autograd.grad(feature.square().sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all(), "the tap sees the image"
    assert feature.ndim == (4 if one.denoiser.family.component == "unet" else 3)
    assert len(feature) == 2
    names = block_names(one.denoiser.network, one.denoiser.family)
    assert one.denoiser.family.tap(one.denoiser.network) in names


IMAGE_TOKENS = {"sd3": 64, "pixart": 64, "sana": 256, "wan": 4, "flux": 64, "flux2_klein": 64, "qwen": 4, "dit": 16,
                "cogvideox": 64}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_TOKENS)
def test_the_tap_gives_the_image_s_tokens_alone(case, name):
    one = case(name)
    tapped = one.denoiser.tapped()
    with torch.no_grad():
        tapped(one.x, one.t, one.condition)
    (feature,) = tapped.features()
    assert tapped.tap is not None
    tapped.tap.remove()
    assert feature.shape[:2] == (2, IMAGE_TOKENS[name])


CAST = ("flux", "flux_guidance", "flux2_klein", "qwen")
"""These cast the time to their weights' type themselves, whatever they are handed."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*CAST, "lumina2")])
def test_close_times_stay_apart_beside_bf16_weights(case, name):
    """64 times in the noisiest twenty-fifth of the scale; in bf16 they would be 11."""
    one, count = case(name), 64
    denoiser = one.denoiser.copy()
    denoiser.network.to(torch.bfloat16)
    row = one.condition.rows(slice(0, 1))
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in row.expand(count).batched.items()}
    small = (one.x[:1] if name == "cogvideox" else one.x[:1, ..., :8, :8]).bfloat16()  # with positions of its own size
    x = small.expand(count, *small.shape[1:])
    times = denoiser.process.at(torch.linspace(0.96, 0.999, count))
    with torch.no_grad():
        said, still = (denoiser(x, t, Condition(narrow, row.shared)).value for t in (times, times[:1].expand(count)))
    assert len({tuple(row.flatten().tolist()) for row in said}) == count
    assert len({tuple(row.flatten().tolist()) for row in still}) == 1


def test_close_times_stay_apart_in_lumina2_s_embedding(case):
    """Its waves are slow, so that close times differ less than a bf16 output can say."""
    one, seen, count = case("lumina2"), [], 64
    denoiser = one.denoiser.copy()
    denoiser.network.to(torch.bfloat16)
    embedder = denoiser.network.get_submodule("time_caption_embed.timestep_embedder")
    embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    row = one.condition.rows(slice(0, 1)).expand(count)
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in row.batched.items()}
    with torch.no_grad():
        denoiser(one.x[:1].bfloat16().expand(count, -1, -1, -1), torch.linspace(0.96, 0.999, count), Condition(narrow))
    assert seen[0].dtype == torch.bfloat16
    assert len({tuple(row.tolist()) for row in seen[0]}) == count


def test_only_networks_made_for_a_guidance_scale_have_the_input(case):
    there = {name for name in NAMES if _guidance(case(name).denoiser) is not None}
    assert there == {"flux_guidance"}
    network = tiny_pipelines.settled(lambda: tiny_pipelines.sd15(time_cond_proj_dim=8))
    config: Any = denoiser_of(network).config
    found = FAMILIES["UNet2DConditionModel"].own_guidance(config)
    assert found is not None
    assert found.argument == "timestep_cond"


def _guidance(denoiser: NetworkDenoiser) -> object:
    config: Any = denoiser.network.config
    return denoiser.family.own_guidance(config)


def test_sana_s_time_scale_and_learned_variance_are_its_config_s():
    def told(**config: Any) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline: Any = tiny_pipelines.sana()
            network = type(pipeline.transformer).from_config(pipeline.transformer.config, **config)
        denoiser = make_denoiser(tiny.alive(network), Schedule(Flow(), Kind.VELOCITY))
        text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        return Case(denoiser, x, Condition({"encoder_hidden_states": text}))

    one = told(timestep_scale=0.001, out_channels=8)
    with torch.no_grad():
        said = one.denoiser(one.x, one.t, one.condition).value
        time = 1000 * one.t * 0.001
        plain = one.denoiser.network(one.x, **one.condition.batched, timestep=time, return_dict=False)[0]
    assert plain.shape == (2, 8, 8, 8)
    assert torch.equal(said, plain[:, :4])


def test_sana_sprint_s_network_lives_on_flow_matching_s_path():
    """Its pipeline moves to TrigFlow's circle and back; cos(t)·ε̂ − sin(t)·x̂_0 is what its scheduler hears, over σ_d."""
    pipeline: Any = tiny_pipelines.settled(tiny_pipelines.sana_sprint)
    seen: list[Any] = []
    own = pipeline.scheduler.step

    def step(said: Tensor, t: Tensor, x: Tensor, **words: Any) -> Any:
        seen.append((said.clone(), t.clone(), x.clone()))
        return own(said, t, x, **words)

    pipeline.scheduler.step = step
    call = tiny_pipelines.call("sana", guidance_scale=4.5)
    pipeline(**call)
    config = {**pipeline.scheduler.config, "_class_name": "SCMScheduler"}
    denoiser = make_denoiser(denoiser_of(pipeline), schedule_of(config))
    told = captured(pipeline, PROMPTS, **SIDES, **tiny_pipelines.facts("sana"))
    assert len(seen) == 2
    for said, t, x in seen:
        cos, sin = t.cos(), t.sin()
        with torch.no_grad():
            flow = denoiser(x / 0.5 / (cos + sin).view(-1, 1, 1, 1), sin / (cos + sin), told)
        expected = said / 0.5
        c, s = cos.view(-1, 1, 1, 1), sin.view(-1, 1, 1, 1)
        torch.testing.assert_close(c * flow.eps - s * flow.x0, expected, rtol=1e-4, atol=1e-4)
