"""Scalar inputs beside the time of a pretrained network: a guidance scale, a jump's length. Silent at the start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.lora import without_adapters

WIDTH = 256  # of the sinusoid, where the network has no embedding of its own to take after


class Scalars:
    """The values `(B,)` of the pass under way, by name; all grafts of one network read the same one.

    It is part of the network's modules, so a deep copy of the network reads one of its own.
    """

    def __init__(self) -> None:
        self.values: Mapping[str, Tensor] = {}


@dataclass(frozen=True, eq=False)
class Graft:
    """The scalar inputs that a network was given; none at first.

    Attributes:
        names: of the inputs.
        scalars: where the network's grafts look. It is only filled during a pass, and so may carry the dual tensors
            of a forward derivative. Blocks that are computed again in the backward pass would find it empty.
        own: parts of the names of the parameters that one adapter's view trains beside its adapter, for its inputs.
    """

    names: tuple[str, ...] = ()
    scalars: Scalars = field(default_factory=Scalars)
    own: tuple[str, ...] = ()

    @contextmanager
    def hearing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the network's grafts see these values `(B,)`; an input that is left out adds nothing."""
        assert set(values) <= set(self.names), f"inputs {sorted(values)} told; the network has {self.names}"
        self.scalars.values = values
        try:
            yield
        finally:
            self.scalars.values = {}

    def grown(self, network: nn.Module, place: str, name: str, unit: float) -> Graft:
        """One more input, added in place to the output of every sub-module of `network` that is called `place`.

        Args:
            network: with this graft's inputs, if any.
            place: the last part of the time embeddings' names.
            name: of the input.
            unit: what the scalar is multiplied with before its sinusoid, whose fastest wave is then sin(unit·value).

        Raises:
            UserError: there is no such sub-module.
        """
        assert name not in self.names, f"{name} is an input already"
        found = [path for path, _ in network.named_modules() if path.rpartition(".")[2] == place]
        if not place or not found:
            raise UserError(f"student: {type(network).__name__} has no time embedding that an input could be added to")
        scalars = self.scalars
        for path in found:
            module = network.get_submodule(path)
            if not isinstance(module, GraftedEmbedding):
                module = GraftedEmbedding(module, scalars)
                network.set_submodule(path, module)
            scalars = module.scalars  # of another view, where several share the network
            module.second[name] = added_embedding(without_adapters(module.base), unit)
        return Graft((*self.names, name), scalars, self.own)

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a view's own inputs in `network`, by name."""
        return {n: p for n, p in network.named_parameters() if any(part in n for part in self.own)}


def part_of_names(name: str) -> str:
    """What the names of an added input's parameters have in them."""
    return f".second.{name}."


class GraftedEmbedding(nn.Module):
    """A time embedding plus embeddings of scalars, each exactly zero until it is trained.

    In a state dict the base keeps the names that it has without a graft, so that the file of a grafted network is that
    of its class with `second.*` keys beside the others.
    """

    def __init__(self, base: nn.Module, scalars: Scalars) -> None:
        super().__init__()
        self.base, self.second, self.scalars = base, nn.ModuleDict(), scalars
        self.register_state_dict_post_hook(_base_goes_unnamed)
        self.register_load_state_dict_pre_hook(_base_is_named)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base says `(B, D)`, and the embeddings of the scalars that the pass is told."""
        out = self.base(*args, **kwargs)
        for name, value in self.scalars.values.items():
            if name in self.second:  # an injection hears the others
                out = out + self.second[name](value).to(out.dtype)
        return out


def _base_goes_unnamed(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix, lambda rest: rest.removeprefix("base."))


def _base_is_named(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    _rename(state, prefix, lambda rest: rest if rest.startswith("second.") else f"base.{rest}")


def _rename(state: dict[str, Any], prefix: str, renamed: Callable[[str], str]) -> None:
    """What follows `prefix`, in place; keys keep their order."""
    for key in list(state):
        name = prefix + renamed(key.removeprefix(prefix)) if key.startswith(prefix) else key
        state[name] = state.pop(key)


class ScalarEmbedding(nn.Module):
    """Layers on the sinusoid of a scalar `(B,)`, which is computed in at least float32."""

    def __init__(self, layers: nn.Module, width: int, unit: float) -> None:
        super().__init__()
        self.layers, self.width, self.unit = layers, width, unit

    def forward(self, value: Tensor) -> Tensor:
        waves = sinusoid(self.unit * (value if value.dtype == torch.float64 else value.float()), self.width)
        return self.layers(waves.to(next(self.layers.parameters()).dtype))


def sinusoid(value: Tensor, width: int) -> Tensor:
    """Cosines and sines `(B, width)` of `value` `(B,)` at frequencies from 1 down to 1/10,000."""
    half = width // 2
    powers = torch.arange(half, device=value.device, dtype=value.dtype) / half
    angles = value[:, None] * torch.exp(-math.log(10000.0) * powers)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def added_embedding(base: nn.Module, unit: float) -> ScalarEmbedding:
    """What embeds a scalar beside `base`, silent at first, because its last layer is zero.

    A copy of the network's own time embedding, or new layers beside a plain linear one and beside embedders that make
    their own sinusoid (Z-Image).
    """
    if isinstance(base, nn.Linear):
        width = base.out_features
        last = nn.Linear(width, width)
        layers = nn.Sequential(nn.Linear(WIDTH, width), nn.SiLU(), last).to(base.weight)
        layers.requires_grad_(base.weight.requires_grad)
        return _silent(ScalarEmbedding(layers, WIDTH, unit), last)
    from diffusers.models.embeddings import TimestepEmbedding

    if not isinstance(base, TimestepEmbedding):
        linear = [part for part in base.modules() if isinstance(part, nn.Linear)]
        assert linear, f"no scalar can be added to a {type(base).__name__}"
        return added_embedding(linear[-1], unit)
    layers = copy.deepcopy(base)
    layers.cond_proj = None  # the native input for a guidance scale stays the base's
    return _silent(ScalarEmbedding(layers, layers.linear_1.in_features, unit), layers.linear_2)


def _silent(embedding: ScalarEmbedding, last: nn.Linear) -> ScalarEmbedding:
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return embedding
