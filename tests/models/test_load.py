"""Networks from pipeline folders and from scratch, and what may be wrong with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from fewstep.config import NewNetwork
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow, Process
from fewstep.errors import UserError
from fewstep.models.capture import denoiser_of
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.hub_name import HubName, commit_of
from fewstep.models.load import load_denoiser, make_denoiser, resolve
from fewstep.models.new_network import Shape, new_denoiser
from fewstep.models.schedule import Schedule
from tests import tiny_pipelines
from tests.tiny import alive, dit_pipeline, sd3_pipeline, sd15_pipeline, unet2d_classes

SMALL = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
DIGITS = Shape(1, 8, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = alive(unet2d_classes(8, 4))
    DDIMPipeline(network, DDIMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_saved_pipeline_s_network(folder):
    found = load_denoiser(str(folder))
    assert (type(found.network).__name__, found.kind) == ("UNet2DModel", Kind.V)
    assert isinstance(found.process, VP)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])
    expected = alive(unet2d_classes(8, 4))(x, t, class_labels=torch.tensor([0, 3])).sample
    torch.testing.assert_close(found(x, t, Condition.of_labels(torch.tensor([0, 3]))).value, expected)
    assert not found.network.training
    assert {p.requires_grad for p in found.parameters().values()} == {False}


@pytest.mark.parametrize(
    ("build", "network", "process", "kind"),
    [
        (dit_pipeline, "DiTTransformer2DModel", VP, Kind.EPS),
        (sd15_pipeline, "UNet2DConditionModel", VP, Kind.EPS),
        (sd3_pipeline, "SD3Transformer2DModel", Flow, Kind.VELOCITY),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of what diffusers thinks of a pipeline without its text encoders
def test_every_family_s_pipeline(tmp_path, build, network, process, kind):
    build().save_pretrained(tmp_path)
    found = load_denoiser(str(tmp_path))
    assert (type(found.network).__name__, type(found.process), found.kind) == (network, process, kind)
    assert {p.dtype for p in found.parameters().values()} == {torch.float32}


PROCESSES: dict[str, Process | type[Process]] = {
    "ddpm": VP, "dit": VP, "sd15": VP, "sdxl": VP, "pixart": VP, "lumina2": Flow(),
    "flux": Flow(math.exp(1.15)), "flux_guidance": Flow(math.exp(1.15)),
    "flux2_klein": Flow(math.exp(compute_empirical_mu(4096, 50))), "qwen": Flow(math.exp(1.15)), "cogvideox": VP,
    "playground": EDM,
}  # fmt: skip
PREDICTED = {"cogvideox": Kind.V, "playground": Kind.X0}


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_the_folder_of_every_tiny_pipeline(tmp_path, name):
    folder = tiny_pipelines.saved(name, tmp_path)
    found, made = load_denoiser(str(folder)), tiny_pipelines.denoiser(tiny_pipelines.build(name))
    its, ours = found.network.state_dict(), made.state_dict()
    assert list(its) == list(ours)
    assert all(torch.equal(its[key], ours[key]) for key in ours)
    expected = PROCESSES.get(name, Flow(3.0))
    if isinstance(expected, Flow):
        assert isinstance(found.process, Flow)
        assert found.process.shift == pytest.approx(expected.shift, rel=1e-4)
        assert found.kind is Kind.VELOCITY
    else:
        assert (type(found.process), found.kind) == (expected, PREDICTED.get(name, Kind.EPS))
        assert (found.preconditioning is not None) is (expected is EDM)


def test_a_size_decides_a_dynamic_shift(tmp_path):
    flux = load_denoiser(str(tiny_pipelines.saved("flux", tmp_path)))
    assert flux.sized((256, 16)).process.step_list(2) == pytest.approx((1.0, math.exp(0.5) / (1 + math.exp(0.5))))
    klein = load_denoiser(str(tiny_pipelines.saved("flux2_klein", tmp_path)))
    at_four, at_fifty = (compute_empirical_mu(1024, steps) for steps in (4, 50))
    sized = klein.sized((1024, 16)).process
    assert isinstance(sized, Flow)
    assert sized.step_list(4)[2] == pytest.approx(1 / (1 + math.exp(-at_four)))
    assert sized.shift == pytest.approx(math.exp(at_fifty))
    sana = load_denoiser(str(tiny_pipelines.saved("sana", tmp_path)))
    assert sana.sized((4, 8, 8)).process == Flow(3.0)
    sd15 = load_denoiser(str(tiny_pipelines.saved("sd15", tmp_path)))
    assert sd15.sized((4, 8, 8)) is sd15


def test_the_hub_gives_the_components_files_only(monkeypatch):
    names = ["model_index.json", "flux1-dev.safetensors", "transformer/config.json", "tokenizer/chat_template.jinja",
             "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
             "unet/diffusion_pytorch_model.bin", "README.md",
             "text_encoder/model-00001-of-00002.safetensors"]  # fmt: skip
    kept: list[str] = []

    def fetched(name: str, revision: str | None, **patterns: Any) -> str:
        kept.extend(filter_repo_objects(names, **patterns))
        return f"/there/{name}/{revision}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert resolve("some/name") == Path("/there/some/name/None")
    assert kept == [names[0], names[2], names[3], names[4], names[8]]
    assert resolve("some/name@refs/pr/1") == Path("/there/some/name/refs/pr/1")


@pytest.mark.parametrize(
    ("path", "repository", "revision"),
    [("a/b", "a/b", None), ("a/b@", "a/b", None), ("a/b@1.0", "a/b", "1.0"), ("a/b@refs/pr/1", "a/b", "refs/pr/1")],
)
def test_a_name_on_the_hub_may_have_a_commit(path, repository, revision):
    assert HubName.of(path) == HubName(repository, revision)
    assert str(HubName(repository, revision)) == path.rstrip("@")


@pytest.mark.parametrize("path", ["", "name", "/a/b", "./b", "a/b/c", "../b@1", "a"])
def test_other_paths_are_no_names_on_the_hub(path):
    assert HubName.of(path) is None


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b@1").mkdir(parents=True)
    assert HubName.of("a/b@1") is None
    assert HubName.of("a/b@2") == HubName("a/b", "2")


def test_the_hub_s_cache_says_which_commit_a_folder_is(tmp_path):
    commit = 20 * "0a"
    assert commit_of(tmp_path / "snapshots" / commit) == commit
    assert commit_of(tmp_path / "snapshots" / "main") is None
    assert commit_of(tmp_path / commit) is None


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage(folder: Path, what: str) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    match what:
        case "no index":
            (folder / "model_index.json").unlink()
        case "index torn":
            (folder / "model_index.json").write_text("{")
        case "index in another encoding":
            (folder / "model_index.json").write_bytes('{"_class_name": "Ä"}'.encode("latin-1"))
        case "index a list":
            (folder / "model_index.json").write_text("[]")
        case "entry empty":
            rewrite(folder / "model_index.json", unet=[])
        case "no network":
            rewrite(folder / "model_index.json", unet=["diffusers", "AutoencoderKL"])
        case "two networks":
            rewrite(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
        case "a component":
            (folder / "model_index.json").unlink()
            (folder / "config.json").write_text("{}")
        case "unknown scheduler":
            (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "MyScheduler"}')
        case "no scheduler":
            (folder / "scheduler" / "scheduler_config.json").unlink()
        case "words for a number":
            rewrite(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEuler", shift="big")
        case "words in the table":
            rewrite(folder / "scheduler" / "scheduler_config.json", beta_start="low")
        case "words in the network":
            rewrite(folder / "unet" / "config.json", layers_per_block="two")
        case "unknown class":
            rewrite(folder / "unet" / "config.json", _class_name="UNet2DModell")
        case "no config":
            (folder / "unet" / "config.json").unlink()
        case "zero terminal snr":
            scheduler = folder / "scheduler" / "scheduler_config.json"
            rewrite(scheduler, rescale_betas_zero_snr=True, prediction_type="epsilon")
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "weights gone":
            weights.unlink()
        case "a weight missing":
            tensors = load_file(weights)
            del tensors["conv_in.weight"]
            save_file(tensors, weights)
        case "a weight too large":
            save_file({**load_file(weights), "conv_in.weight": torch.zeros(9, 3, 3, 3)}, weights)


DAMAGE = [
    ("no index", "no model_index.json; a diffusers pipeline folder is needed"),
    ("index torn", "model_index.json: not JSON"),
    ("index in another encoding", "model_index.json: not JSON"),
    ("index a list", "model_index.json: list found; values by name are needed"),
    ("entry empty", "one network of UNet2DModel, .* is needed; its components are scheduler: .*, unet: None"),
    ("no network", "one network of UNet2DModel, .* is needed; its components are scheduler: DDIMScheduler, unet: Auto"),
    ("two networks", "unet and transformer_2 are networks both; pipelines of one network are known"),
    ("a component", "one component, without a model_index.json; give the pipeline folder above it"),
    (
        "unknown scheduler",
        "scheduler: MyScheduler states no noise table; variance-preserving, FlowMatch and EDM ones are",
    ),
    ("no scheduler", "scheduler: no scheduler_config.json"),
    ("words for a number", "scheduler: its config is damaged: could not convert string to float: 'big'"),
    ("words in the table", "scheduler: no noise table can be made of it: .*"),
    ("words in the network", "unet: the weights cannot be read: "),
    ("unknown class", "network 'UNet2DModell' is not known; did you mean 'UNet2DModel'?"),
    ("no config", "unet: no config.json"),
    ("zero terminal snr", "leaves x̂_0 undefined at pure noise"),
    ("weights cut short", "unet: the weights cannot be read"),
    ("weights gone", r"unet: no \*.safetensors"),
    ("a weight missing", "unet: the weights cannot be read: conv_in.weight is missing"),
    ("a weight too large", r"unet: the weights cannot be read: .*conv_in.weight expected shape .*8, 3, 3, 3.* got .*9"),
]


@pytest.mark.parametrize(("what", "told"), DAMAGE)
def test_damage_is_one_line(folder, what, told):
    damage(folder, what)
    with pytest.raises(UserError, match=told) as caught:
        load_denoiser(str(folder))
    assert "\n" not in str(caught.value)


def test_a_config_that_its_class_cannot_serve():
    """diffusers' Qwen-Image takes `guidance_embeds` and has no layers for it: it would fail at the first call."""
    network: Any = denoiser_of(tiny_pipelines.qwen())
    schedule = Schedule(Flow(), Kind.VELOCITY)
    network.register_to_config(guidance_embeds=False)
    assert make_denoiser(network, schedule).family.own_guidance(network.config) is None
    network.register_to_config(guidance_embeds=True)
    with pytest.raises(UserError, match=r"^QwenImageTransformer2DModel: its config says guidance_embeds: true, .*$"):
        make_denoiser(network, schedule)


def test_paths_that_lead_nowhere(folder):
    assert resolve(str(folder)) == folder
    with pytest.raises(UserError, match=r"teacher.path: no folder or embedded teacher '/no/such'"):
        resolve("/no/such")
    with pytest.raises(
        UserError, match=r"teacher.path: 'nobody/nothing' is no folder, and the hub did not give it: "
    ) as e:
        resolve("nobody/nothing")
    assert "\n" not in str(e.value)


def new(shape: Shape = DIGITS, seed: int = 0, **spec: object) -> NetworkDenoiser:
    return new_denoiser(NewNetwork.model_validate({"config": SMALL, **spec}), shape, seed)


def test_from_scratch_it_predicts_zero_and_fits_the_data():
    made = new()
    x = torch.randn(2, 1, 8, 8)
    said = made(x, torch.tensor([0.0, 999.0]), Condition.of_labels(torch.tensor([0, 10])))
    assert not said.value.any()
    config: Any = made.network.config
    assert config["num_class_embeds"] == 11
    assert isinstance(made.process, VP)
    assert float(made.process.alphas_cumprod[500]) == pytest.approx(0.494, abs=0.01), "cosine"
    assert made.kind is Kind.V


def test_its_weights_come_from_the_seed_alone():
    one, torch_moved, other = new(seed=3), (torch.randn(5), new(seed=3))[1], new(seed=4)
    same = [
        torch.equal(a, b) for a, b in zip(one.parameters().values(), torch_moved.parameters().values(), strict=True)
    ]
    assert all(same)
    assert not torch.equal(one.parameters()["conv_in.weight"], other.parameters()["conv_in.weight"])


def test_flow_from_scratch():
    made = new(process="flow", shift=3.0, prediction="velocity", shape=Shape(3, 8, 0))
    assert made.process == Flow(3.0)
    assert made.kind is Kind.VELOCITY
    assert made.null is None


def test_a_new_dit():
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    made = new(network="DiTTransformer2DModel", config=config)
    said = made(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), Condition.of_labels(torch.tensor([0, 10])))
    assert said.value.shape == (2, 1, 8, 8)
    assert not said.value.any()


REFUSED = [
    (
        {"network": "UNet2DModell"},
        r"student.new.network: 'UNet2DModell' is not one of .*; did you mean 'UNet2DModel'\?",
    ),
    ({"network": "VectorNetwork"}, r"student.new.network: 'VectorNetwork' is not one of"),
    ({"network": "SD3Transformer2DModel"}, r"student.new.network: 'SD3Transformer2DModel' is not one of"),
    ({"config": {**SMALL, "layer_per_block": 1}}, r"config.layer_per_block: .* did you mean 'layers_per_block'\?"),
    ({"config": {**SMALL, "norm_num_groups": 3}}, r"student.new.config: UNet2DModel refuses it: "),
    ({"config": {**SMALL, "norm_num_groups": 0}}, r"student.new.config: UNet2DModel refuses it: "),
    ({"config": {"block_out_channels": 8}}, r"student.new.config: UNet2DModel refuses it: "),
    ({"config": {"down_block_types": ["Nonsense"]}}, r"student.new.config: UNet2DModel refuses it: "),
]


@pytest.mark.parametrize(("spec", "told"), REFUSED)
def test_a_network_that_cannot_be(spec, told):
    with pytest.raises(UserError, match=told) as caught:
        new(**spec)
    assert "\n" not in str(caught.value)
