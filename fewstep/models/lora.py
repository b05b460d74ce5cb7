"""Several low-rank adapters on one frozen network: student and fake score as views on the teacher's weights."""

from __future__ import annotations

import warnings

from torch import nn

BASE = "base"


class Adapters:
    """Which adapter of a network is active; `BASE` is none, the frozen weights alone.

    peft's own switch turns `requires_grad` off for every other adapter, and a later backward of a loss that used
    them then gives zero gradients without an error. So the flags are put back after each switch.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._layers: list[nn.Module] = []
        self._ranks: dict[str, int] = {}
        self._active = BASE

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters there are."""
        return tuple(self._ranks)

    def rank(self, name: str) -> int:
        """Rank of an adapter."""
        return self._ranks[name]

    def add(self, name: str, rank: int) -> None:
        """Put an adapter of that rank, zero at the start, on every linear layer; the network's weights freeze."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        there = self._flags()
        linear = [n for n, m in self._network.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
        targets = sorted({n.removesuffix(".base_layer") for n in linear})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # more than one is what this is for
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self._network, name)
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
        from peft.tuners.tuners_utils import BaseTunerLayer

        flags = self._flags()
        for layer in self._layers:
            assert isinstance(layer, BaseTunerLayer)
            layer.enable_adapters(name != BASE)
            if name != BASE:
                layer.set_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self._active = name

    def _flags(self) -> list[tuple[nn.Parameter, bool]]:
        """The adapters' parameters, and whether gradients flow into each."""
        return [(p, p.requires_grad) for n, p in self._network.named_parameters() if ".lora_" in n]
