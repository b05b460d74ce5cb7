"""Several low-rank adapters on one frozen network: student and fake score as views on the teacher's weights."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

from torch import nn

BASE = "base"


class Adapters:
    """Which adapter of a network is active; `BASE` is none, the frozen weights alone.

    peft's own switch turns `requires_grad` off for every other adapter: a later backward of a loss that used them then
    gives zero gradients without an error, and no forward derivative can be taken of a network that switches. So the
    switch here says which adapter computes, and nothing else.

    Attributes:
        convolutions: whether the adapters still to come sit on convolutions too, beside the linear layers.
        beside: parts of the names of parameters that one adapter's view trains beside it; they take no adapter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.convolutions = False
        self.beside: tuple[str, ...] = ()
        self._network = network
        self._layers: list[Any] = []
        self._ranks: dict[str, int] = {}
        self._active = BASE

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters there are."""
        return tuple(self._ranks)

    @property
    def active(self) -> str:
        """The one that computes now."""
        return self._active

    def rank(self, name: str) -> int:
        """Rank of an adapter."""
        return self._ranks[name]

    def add(self, name: str, rank: int) -> None:
        """Put an adapter of that rank, zero at the start, on every layer that takes one; the network's weights freeze.

        They are all linear layers and, with `convolutions`, all convolutions that are not split into groups.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        there = self._flags()
        # In full: peft takes the names of a list for endings, and would find `proj_out` in every block as well.
        targets = "|".join(re.escape(target) for target in self._targets())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # more than one is what this is for
            config, meta = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), _on_meta(self._network)
            inject_adapter_in_model(config, self._network, name, low_cpu_mem_usage=meta)
        self._network.requires_grad_(False)
        for parameter, flag in [*there, *((p, True) for p in self.parameters(name).values())]:
            parameter.requires_grad_(flag)
        self._layers = [m for m in self._network.modules() if isinstance(m, BaseTunerLayer)]
        self._ranks[name], self._active = rank, ""
        self.activate(name)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        return {n: p for n, p in self._network.named_parameters() if f".{name}." in n and ".lora_" in n}

    def activate(self, name: str) -> None:
        """Compute with adapter `name` from now on."""
        if name == self._active or not self._layers:
            return
        for layer in self._layers:
            layer._disable_adapters = name == BASE
            if name != BASE:
                layer._active_adapter = [name]
        self._active = name

    def _targets(self) -> list[str]:
        """Names of the layers, which are the same whether or not an adapter sits there already."""
        found = [n for n, m in self._network.named_modules() if self._takes_one(m)]
        return sorted({n.removesuffix(".base_layer") for n in found if not self._trains(f".{n}.")})

    def _trains(self, name: str) -> bool:
        return ".lora_" in name or any(part in name for part in self.beside)

    def _takes_one(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return self.convolutions and module.groups == 1
        return isinstance(module, nn.Linear)

    def _flags(self) -> list[tuple[nn.Parameter, bool]]:
        """What views train, and whether gradients flow into each."""
        return [(p, p.requires_grad) for n, p in self._network.named_parameters() if self._trains(n)]


def _on_meta(network: nn.Module) -> bool:
    """Whether the network has no values, as in a dry run; its adapters must have none either."""
    return next(network.parameters()).is_meta


def without_adapters(network: nn.Module, adapter: str = BASE) -> nn.Module:
    """A copy of a network or a part of it with plain layers: `adapter` is added to their weights, all others go.

    An adapter adds B·A·x beside W·x; W + B·A gives the same up to rounding.
    """
    from peft.tuners.lora import LoraLayer

    network = copy.deepcopy(network)
    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, LoraLayer)]:
        if adapter != BASE:
            layer.merge(adapter_names=[adapter])
        if not name:
            return layer.get_base_layer()  # the part is a single layer
        network.set_submodule(name, layer.get_base_layer())
    return network
