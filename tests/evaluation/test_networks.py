"""Feature networks that need weights from elsewhere: right with weights of our own making, and one line without any."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet
from transformers import Dinov2Config, Dinov2Model

from fewstep.errors import UserError
from fewstep.evaluation.clip import ClipFeatures
from fewstep.evaluation.extractors import extractor
from fewstep.evaluation.features import resized
from fewstep.evaluation.spread import clip_score, diversity
from tests.tiny_features import save_clip

ARCH = "fewstep-tiny"


def pixels(count: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def said(call, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No weights in any of the usual places."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("fewstep.evaluation.inception.tempfile.gettempdir", lambda: str(tmp_path / "tmp"))


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory) -> Path:
    """A CLIP of a few thousand weights, saved as safetensors, of an architecture that open_clip now knows."""
    return save_clip(tmp_path_factory.mktemp("clip"), ARCH, 32)


def test_clip_score_equals_a_hand_computation(clip_file):
    network = ClipFeatures(f"{ARCH}:{clip_file}")
    captions = ("a red car", "a gift box", "a red car", "an octopus")
    ours = clip_score(network(pixels()).values, network.text(captions))
    model: Any = open_clip.create_model(ARCH, pretrained=str(clip_file)).eval()
    tokenize = open_clip.get_tokenizer(ARCH)
    cosines = []
    for image, caption in zip(pixels(), captions, strict=True):
        array = image.permute(1, 2, 0).numpy().astype(np.float32) / 255
        array = (array - np.array(open_clip.OPENAI_DATASET_MEAN)) / np.array(open_clip.OPENAI_DATASET_STD)
        with torch.no_grad():
            seen = model.encode_image(torch.from_numpy(array).permute(2, 0, 1)[None].float())[0]
            read = model.encode_text(tokenize([caption]))[0]
        cosines.append(float(seen @ read / (seen.norm() * read.norm())))
    assert max(cosines) > 0
    assert ours.value == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), rel=1e-4)


def test_clip_features_have_length_one_and_an_identity_of_their_weights(clip_file):
    network = extractor(f"clip:{ARCH}:{clip_file}")
    values = network(pixels(3, 40)).values
    assert torch.allclose(values.norm(dim=1), torch.ones(3), atol=1e-5)
    identity = network.identity
    assert (identity.name, identity.size, identity.resize) == (f"clip:{ARCH}", 32, "bicubic-antialias")
    assert network.text is not None
    texts = network.text(["one", "two", "one"])
    assert torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])


def test_missing_clip_weights(clip_file, tmp_path):
    said(lambda: extractor("clip:ViT-B-33:openai"), "no architecture 'ViT-B-33'", "did you mean 'ViT-B-32'?")
    said(
        lambda: extractor("clip:ViT-B-32"), "clip:ViT-B-32 names no weights", "clip:ViT-B-32:PATH", "efficientnet-lite0"
    )
    said(lambda: extractor("clip:ViT-B-32:opena"), "'opena' is no file and no tag", "did you mean 'openai'?")
    said(lambda: extractor("clip"), "found 'clip', the form is clip:ARCH:TAG_OR_PATH")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    said(lambda: extractor(f"clip:{ARCH}:{broken}"), "cannot be had", "efficientnet-lite0")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
        model = Dinov2Model(config)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return folder


def test_dinov2_gives_the_class_token(dino_folder):
    network = extractor(f"dinov2:{dino_folder}")
    ours = network(pixels(2)).values
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    frames = []
    for image in pixels(2):
        planes = [
            Image.fromarray(plane.numpy()).convert("F").resize((224, 224), Image.Resampling.BICUBIC) for plane in image
        ]
        frames.append(np.stack([np.clip(np.asarray(plane), 0, 255) for plane in planes]) / 255)
    mean, std = (np.array(row)[None, :, None, None] for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        theirs = model(torch.from_numpy((np.stack(frames) - mean) / std).float()).last_hidden_state[:, 0]
    assert ours.shape == (2, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_missing_dinov2_weights(tmp_path, dino_folder):
    said(
        lambda: extractor(f"dinov2:{tmp_path}"),
        "is no folder with a model",
        "dinov2:FOLDER",
        "efficientnet-lite0 works",
    )
    said(lambda: extractor("dinov2"), "'facebook/dinov2-large' is no folder with a model, and not in the hub's cache")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    said(lambda: extractor(f"dinov2:{tmp_path}"), "holds a model of the kind 'vit'")
    (tmp_path / "config.json").write_text((dino_folder / "config.json").read_text())
    said(lambda: extractor(f"dinov2:{tmp_path}"), "has no weights in safetensors")


class _Layers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 4)[:, :, None, None]


class _Archive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_inception_from_the_archive_is_called_as_clean_fid_calls_it(tmp_path):
    from cleanfid.inception_torchscript import InceptionV3W

    place = tmp_path / "cache" / "inception-2015-12-05.pt"
    place.parent.mkdir()
    torch.jit.save(torch.jit.script(_Archive()), place)
    network = extractor("inception")  # found in fewstep's own folder
    assert str(network.identity).startswith("inception@299 resize=bicubic-antialias sha256:")
    theirs = InceptionV3W(str(place.parent), download=False)
    frames = resized(pixels(), 299, torch.device("cpu"))
    with pytest.raises(RuntimeError):  # it wants 2048 features a sample; ours has 12
        theirs(frames)
    torch.testing.assert_close(network(pixels()).values, theirs.layers((frames - 128) / 128).flatten(1))
    assert network.gives_logits is False


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than:UserWarning")
@pytest.mark.slow
def test_inception_from_the_plain_weights_is_clean_fid_s(tmp_path, monkeypatch):
    from cleanfid import inception_pytorch

    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        state = inception_pytorch.fid_inception_v3().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    with torch.no_grad():
        wanted = theirs(resized(pixels(2), 299, torch.device("cpu")).contiguous() / 255)[0].flatten(1)
    seen = extractor(f"inception:{path}")(pixels(2))
    assert seen.values.shape == (2, 2048)
    torch.testing.assert_close(seen.values, wanted, rtol=1e-4, atol=1e-5)
    assert float(wanted.std()) > 0, "an empty comparison"
    assert seen.logits is not None
    torch.testing.assert_close(seen.logits, seen.values @ state["fc.weight"].T + state["fc.bias"], rtol=1e-4, atol=1e-5)


def test_missing_inception_weights(tmp_path):
    said(lambda: extractor("inception"), "put inception-2015-12-05.pt or pt_inception-2015-12-05-6726825d.pth into",
         str(tmp_path / "cache"), "inception:PATH", "efficientnet-lite0 works")  # fmt: skip
    said(lambda: extractor(f"inception:{tmp_path / 'no.pt'}"), "no file", "no.pt")
    for name in ("broken.pt", "broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        said(lambda name=name: extractor(f"inception:{tmp_path / name}"), f"{name} does not hold its weights")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    said(lambda: extractor(f"inception:{tmp_path / 'other.pth'}"), "other.pth does not hold its weights")


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            trunk = alexnet(weights=None).features
        trunk = trunk.to_empty(device="cpu")
        for parameter in trunk.parameters():
            parameter.data.normal_(0, 0.05)
        state = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    path = tmp_path_factory.mktemp("alexnet") / "alexnet-owt-7be5be79.pth"
    torch.save(state, path)
    return path


def test_lpips_diversity_equals_torchmetrics_pair_by_pair(alexnet_file):
    values = extractor(f"lpips:{alexnet_file}")(pixels(4, 64)).values
    theirs = _their_lpips()
    state = torch.load(alexnet_file, weights_only=True)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(state["features." + re.sub(r"^slice\d\.", "", name)])
    frames = pixels(4, 64).float() / 127.5 - 1
    pairs = [(i, j) for i in range(4) for j in range(i)]
    with torch.no_grad():
        wanted = [float(theirs(frames[i : i + 1], frames[j : j + 1])) for i, j in pairs]
    ours = [float((values[i] - values[j]).square().sum()) for i, j in pairs]
    assert ours == pytest.approx(wanted, rel=1e-4)
    assert diversity(values, None).value == pytest.approx(np.mean(wanted), rel=1e-4)


def _their_lpips() -> _LPIPS:
    """Without the 58 million weights of AlexNet's head, which LPIPS does not use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.Linear.reset_parameters", lambda self: None)
        return _LPIPS(pretrained=True, net="alex", pnet_rand=True)


def test_missing_lpips_weights(tmp_path):
    said(
        lambda: extractor("lpips"), "put alexnet-owt-7be5be79.pth into", "lpips:PATH", "diversity on efficientnet-lite0"
    )
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    said(lambda: extractor(f"lpips:{tmp_path / 'other.pth'}"), "does not hold torchvision's AlexNet")


MODULE = """
import torch

class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.drop = torch.nn.Dropout()

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.drop(self.scale * images.float().mean(dim=(2, 3)))

ready = Means()
number = 3

def broken():
    return torch.nn.Flatten(0)
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[str]:
    (tmp_path / "my_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_features"
    sys.modules.pop("my_features", None)


@pytest.mark.parametrize("attribute", ["Means", "ready"])
def test_anybodys_module(package, attribute):
    network = extractor(f"module:{package}.{attribute}")
    torch.testing.assert_close(network(pixels()).values, 2 * pixels().float().mean(dim=(2, 3)))
    assert network(pixels()[:, :1]).values.shape == (4, 3)  # grey is seen as grey
    assert str(network.identity).startswith(f"module:my_features.{attribute}@0 resize=its own")


def test_a_module_that_is_none(package):
    said(lambda: extractor("module:my_feature.Means"), "cannot be imported", "module:PACKAGE.ATTR", "PYTHONPATH")
    said(lambda: extractor(f"module:{package}.Meanz"), "cannot be imported")
    said(lambda: extractor("module:Means"), "cannot be imported")
    said(lambda: extractor(f"module:{package}.number"), "found int, a torch module is needed")
    said(lambda: extractor(f"module:{package}.broken")(pixels()), "gave (12288,) for 4 images, (B, D) is needed")
    said(lambda: extractor("module"), "the form is module:PACKAGE.ATTR")


def test_names_take_what_their_form_says():
    said(lambda: extractor("efficientnet-lite0:x"), "found 'efficientnet-lite0:x', the form is efficientnet-lite0")
    said(lambda: extractor("inceptoin:x"), "none is named 'inceptoin'", "did you mean 'inception'?")
