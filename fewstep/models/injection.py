"""Additions to a frozen network's hidden states, made by hooks: its weights and their names stay as they are."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewstep.data.batch import Batch
from fewstep.diffusion.process import Process
from fewstep.errors import UserError
from fewstep.models.conditioning import LABELS, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import family_of, scheduler_time
from fewstep.models.graft import Graft, Scalars
from fewstep.models.guidance_input import GUIDANCE
from fewstep.models.taps import FeatureTap, block_names

Part = Literal["all", "decoder"]

_INSIDE = (r"\.transformer_blocks\.\d+$", r"\.resnets\.\d+$")
"""In a UNet's blocks, which return a tuple of residuals too: where attention reads the condition, else the others."""
_TEXT = ("pooled_projections", "encoder_hidden_states", "cap_feats")
_WAVES = 6


def blocks_of(network: nn.Module, part: Part = "all") -> tuple[str, ...]:
    """Names of the blocks whose output is added to: all, or those of a UNet's decoder or of the second half.

    They are the blocks that the family lists, and of a UNet what these are made of.

    Raises:
        UserError: fewstep does not know the network, or it has no blocks.
    """
    kind = type(network).__name__
    outer = set(block_names(network, family_of(kind)))
    names = [name for name, _ in network.named_modules()]
    inner = ([n for n in names if re.search(one, n) and not outer.isdisjoint(_above(n))] for one in _INSIDE)
    found = next(filter(None, inner), [name for name in names if name in outer])
    if part == "decoder":
        upper = [name for name in found if name.startswith("up_blocks.")]
        found = upper or found[len(found) // 2 :]
    if not found:
        raise UserError(f"student: this {kind} has no blocks that guidance could be added to")
    return tuple(found)


def _above(name: str) -> list[str]:
    """The modules that a module is in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


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
        self.times: tuple[float, float] = tuple(_ends(process).tolist())
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
        told = Told(denoiser.process, scales, example.condition, 0 if labels is None else int(labels), width)
        first, last = denoiser.family.inputs(denoiser.network, example.x, _ends(denoiser.process))[denoiser.family.time]
        told.times = float(first), float(last)
        return told

    def forward(self, scale: Tensor, timestep: Tensor, condition: Mapping[str, Any]) -> Tensor:
        out = self.of_scale(_waves(scale, self.scales)) + self.of_time(_waves(timestep, self.times))
        if self.of_label is not None:
            out = out + self.of_label(condition[LABELS])
        for key, layer in self.of_text.items():
            out = out + layer(_as_vectors(condition[key]).to(out.dtype))
        return self.mixed(out)


def _ends(process: Process) -> Tensor:
    """The scheduler's timesteps `(2,)` at clean data and at noise."""
    return scheduler_time(process, torch.tensor([process.t_min, process.t_max], dtype=torch.float64))


def _as_vectors(text: Tensor | Sequence[Tensor]) -> Tensor:
    """Embeddings of tokens `(B, N, D)`, or one `(N, D)` a sample, by their mean; pooled ones `(B, D)` as they are."""
    if not isinstance(text, Tensor):
        return torch.stack([one.mean(0) for one in text])
    return text.mean(1) if text.ndim == 3 else text


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
        self.sample, self.time, self.element = "", "", -1
        self.hears = False
        self._unheard: tuple[Tensor, Tensor, dict[str, Any]] | None = None

    @abstractmethod
    def hear(self, sample: Tensor, scale: Tensor, told: Mapping[str, Any]) -> None:
        """What a pass begins with: x_t `(B, *)`, the scales `(B,)`, and the network's arguments, `timestep` one."""

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
        if denoiser.graft.names or denoiser.guidance_range is not None:
            inputs = ", ".join(denoiser.graft.names) or GUIDANCE
            raise UserError(
                f"student: its network has an input ({inputs}) already; the method adds guidance to one without"
            )
        network = denoiser.network
        family, self.scalars = denoiser.family, denoiser.graft.scalars
        self.sample, self.time, self.element = family.sample, family.time, family.tap_element
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
        self._unheard = (
            None if scale is None else (kwargs[self.sample], scale, {**kwargs, "timestep": kwargs[self.time]})
        )

    def _add(self, index: int, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Of a block that returns text and image the image stream is added to."""
        if not self.hears:
            return output
        if isinstance(output, tuple):
            parts = list(output)
            parts[self.element] = self._sum(index, parts[self.element])
            return tuple(parts)
        return self._sum(index, output)

    def _sum(self, index: int, hidden: Tensor) -> Tensor:
        if self._unheard is not None:  # at the first block: where the network's weights visit a device, they are there
            self.hear(*tree_map(lambda v: v.to(hidden.device) if isinstance(v, Tensor) else v, self._unheard))
            self._unheard = None
        return hidden + self.addition(index, hidden).to(hidden.dtype)

    def _end(self, _network: nn.Module, _args: Any, _output: Any) -> None:
        self.hears, self._unheard = False, None
        self.forget()


def taken_up(denoiser: NetworkDenoiser, name: str, scales: tuple[float, float]) -> NetworkDenoiser | None:
    """The denoiser as `install` would give it, with what its network has in it from an earlier run; None: nothing.

    Raises:
        UserError: that was made for other scales, or adapters share its weights.
    """
    there = dict(denoiser.network.named_children()).get(name)
    if there is None:
        return None
    told = there.get_submodule("told")
    assert isinstance(told, Told)
    if denoiser.adapters.names:
        raise UserError("student.lora: the method brings adapters of its own; leave out student.lora")
    if scales != told.scales:
        raise UserError(f"method.guidance_range: {list(scales)} given; what the student has in its network was made "
                        f"for {list(told.scales)}")  # fmt: skip
    return replace(denoiser, guidance_range=scales, fixed=Condition())


def silent(layer: nn.Linear) -> nn.Linear:
    """The layer at zero, so that what follows it is not there until trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
