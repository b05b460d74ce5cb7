"""Additions to a frozen network's hidden states, made by hooks: its weights and their names stay as they are."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.errors import UserError
from fewstep.models.conditioning import LABELS, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import scheduler_time
from fewstep.models.graft import Graft, Scalars
from fewstep.models.guidance_input import GUIDANCE
from fewstep.models.taps import FeatureTap

Part = Literal["all", "decoder"]

_BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "UNet2DModel": r"\.resnets\.\d+$",
        "UNet2DConditionModel": r"\.transformer_blocks\.\d+$",
        "DiTTransformer2DModel": r"^transformer_blocks\.\d+$",
        "SD3Transformer2DModel": r"^transformer_blocks\.\d+$",
        "VectorNetwork": r"^middle\.\d+$",
    }
)
"""Names of the blocks whose output is added to: where attention reads the condition, else the residual blocks."""

_TEXT = ("pooled_projections", "encoder_hidden_states")
_WAVES = 6


def blocks_of(network: nn.Module, part: Part = "all") -> tuple[str, ...]:
    """Names of the blocks that can be added to: all, or those of a UNet's decoder or of the second half.

    Raises:
        UserError: fewstep does not know the network's blocks, or there are none.
    """
    kind = type(network).__name__
    pattern = _BLOCKS.get(kind)
    found = [] if pattern is None else [name for name, _ in network.named_modules() if re.search(pattern, name)]
    if part == "decoder":
        upper = [name for name in found if name.startswith("up_blocks.")]
        found = upper or found[len(found) // 2 :]
    if not found:
        raise UserError(f"student: {kind} has no blocks that guidance could be added to; known: {', '.join(_BLOCKS)}")
    return tuple(found)


@torch.no_grad()
def hidden_shapes(denoiser: NetworkDenoiser, blocks: tuple[str, ...], example: Batch) -> tuple[torch.Size, ...]:
    """Shapes `(1, *)` of the blocks' outputs for one sample."""
    tap = FeatureTap(denoiser.network, blocks, denoiser.family.tap_element)
    denoiser(example.x, denoiser.process.times(denoiser.process.t_max, example.x), example.condition)
    features = tap.take()
    tap.remove()
    return tuple(feature.shape for feature in features)


class Told(nn.Module):
    """One vector `(B, width)` of the guidance scale, the time and the condition.

    Scale and time enter by their place in their ranges, with a few slow waves: neighbouring scales stay neighbours,
    which diffusers' sinusoid of 1000·s does not keep.
    """

    def __init__(self, process: Process, scales: tuple[float, float], example: Condition, classes: int, width: int):
        super().__init__()
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
        self.times: tuple[float, float] = tuple(scheduler_time(process, ends).tolist())
        self.scales, self.width = scales, width
        self.of_scale, self.of_time = (_layers(1 + 2 * _WAVES, width) for _ in range(2))
        self.of_label = nn.Embedding(classes + 1, width) if classes else None
        text = {key: value.shape[-1] for key, value in example.batched.items() if key in _TEXT}
        self.of_text = nn.ModuleDict({key: nn.Linear(size, width) for key, size in text.items()})
        self.mixed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    @staticmethod
    def of(denoiser: NetworkDenoiser, scales: tuple[float, float], example: Batch, width: int) -> Told:
        """For the times, labels and text embeddings that this denoiser is told."""
        labels = None if denoiser.null is None else denoiser.null.labels
        return Told(denoiser.process, scales, example.condition, 0 if labels is None else int(labels), width)

    def forward(self, scale: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        out = self.of_scale(_waves(scale, self.scales)) + self.of_time(_waves(timestep, self.times))
        if self.of_label is not None:
            out = out + self.of_label(condition[LABELS])
        for key, layer in self.of_text.items():
            text = condition[key]
            out = out + layer((text.mean(1) if text.ndim == 3 else text).to(out.dtype))
        return self.mixed(out)


def _layers(size: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))


def _waves(value: Tensor, ends: tuple[float, float]) -> Tensor:
    """A number `(B,)` by its place between `ends`, −1 to 1, and waves of it: `(B, 13)` float32."""
    low, high = ends
    place = (2 * (value.float() - low) / (high - low) - 1)[:, None]
    angles = place * (torch.pi / 2) * 2.0 ** torch.arange(_WAVES, device=value.device)
    return torch.cat([place, angles.sin(), angles.cos()], dim=1)


class Injection(nn.Module):
    """What is added to the outputs of some blocks of a network, while a guidance scale is told; else nothing.

    It becomes a sub-module of the network. A deep copy of the network takes its own copy along, hooks and all.
    """

    def __init__(self, blocks: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self.scalars = Scalars()
        self.sample = ""
        self.hears = False

    @abstractmethod
    def hear(self, sample: Tensor, scale: Tensor, told: Mapping[str, Any]) -> None:
        """What a pass begins with: x_t `(B, *)`, the scales `(B,)`, and the network's other arguments."""

    @abstractmethod
    def addition(self, index: int, hidden: Tensor) -> Tensor:
        """What is added to block `index`'s output `hidden`, of its shape."""

    @abstractmethod
    def forget(self) -> None:
        """What a pass ends with."""

    def install(self, denoiser: NetworkDenoiser, name: str, scales: tuple[float, float]) -> NetworkDenoiser:
        """The denoiser, its network frozen and added to in place, taking guidance scales of that range.

        Raises:
            UserError: adapters share its weights.
        """
        if denoiser.adapters.names:
            raise UserError("student.lora: the method brings adapters of its own; leave out student.lora")
        assert not denoiser.graft.names, "a network with other added inputs"
        network = denoiser.network
        self.sample, self.scalars = denoiser.family.sample, denoiser.graft.scalars
        network.requires_grad_(False)
        device = next(network.parameters()).device
        network.add_module(name, self.to(device))
        network.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(self.blocks):
            network.get_submodule(block).register_forward_hook(partial(self._add, index))
        network.register_forward_hook(self._end)
        return replace(denoiser, graft=Graft((GUIDANCE,), self.scalars), guidance_range=scales)

    def share_of(self, network: nn.Module) -> float:
        """Its parameters as a share of all others of the network."""
        own = sum(p.numel() for p in self.parameters())
        return own / (sum(p.numel() for p in network.parameters()) - own)

    def _begin(self, _network: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        scale = self.scalars.values.get(GUIDANCE)
        self.hears = scale is not None
        if scale is not None:
            self.hear(kwargs[self.sample], scale, kwargs)

    def _add(self, index: int, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Of a block that returns text and image the image stream, which comes last, is added to."""
        if not self.hears:
            return output
        if isinstance(output, tuple):
            return (*output[:-1], self._sum(index, output[-1]))
        return self._sum(index, output)

    def _sum(self, index: int, hidden: Tensor) -> Tensor:
        return hidden + self.addition(index, hidden).to(hidden.dtype)

    def _end(self, _network: nn.Module, _args: Any, _output: Any) -> None:
        self.hears = False
        self.forget()


def silent(layer: nn.Linear) -> nn.Linear:
    """The layer at zero, so that what follows it is not there until trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
