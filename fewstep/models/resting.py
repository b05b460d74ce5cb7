"""Modules that rest in the host's memory and visit a device while they compute, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn


class Resting:
    """Text encoders and a VAE whose weights lie in the host's memory, page-locked beside CUDA.

    Whoever is called comes to the device, and whoever was there before leaves. The weights on the host stay while a
    module visits, so that leaving copies nothing. The hooks are accelerate's, which tell diffusers' pipelines where
    their modules compute.

    Args:
        modules: each once; they must lie on the host.
        device: where they compute.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._visitors = tuple(_Visitor(self, module, device) for module in modules)
        for visitor in self._visitors:
            add_hook_to_module(visitor.module, visitor)

    @contextmanager
    def visits(self) -> Iterator[None]:
        """Inside, those who are called are on the device one after the other; at the end, nobody is."""
        try:
            yield
        finally:
            self.leave()

    def leave(self, but: _Visitor | None = None) -> None:
        """Everybody goes, but for one."""
        for visitor in self._visitors:
            if visitor is not but:
                visitor.leave()


class _Visitor(ModelHook):
    """One module's way to the device and back. `execution_device` is what diffusers asks for."""

    def __init__(self, house: Resting, module: nn.Module, device: torch.device) -> None:
        self.module, self.execution_device = module, device
        self._house = house
        tensors = {id(one): one for one in (*module.parameters(), *module.buffers())}.values()
        self._home = [(one, kept(one.data, device)) for one in tensors]
        self._away = False
        self.leave()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Before the module, or a method that diffusers has marked, is called."""
        self._house.leave(but=self)
        if not self._away:
            for tensor, home in self._home:
                tensor.data = brought(home, self.execution_device)
            self._away = True
        return args, kwargs

    def leave(self) -> None:
        """Back to the weights on the host."""
        for tensor, home in self._home:
            tensor.data = home
        self._away = False


def kept(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor as it rests: where CUDA can fetch it without the host's help."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, for a visit."""
    return tensor.to(device, non_blocking=True)
