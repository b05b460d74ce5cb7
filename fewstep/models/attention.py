"""Which kernel computes attention, through diffusers' two switches, checked before anything runs."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn

from fewstep.errors import UserError

Attention = Literal["auto", "sdpa", "flash", "sage", "xformers"]

PACKAGES = {"flash": ("flash_attn", "flash-attn"), "sage": ("sageattention", "sageattention"),
            "xformers": ("xformers", "xformers")}  # fmt: skip
"""Module and package of each kernel that does not come with torch."""


def set_attention(network: nn.Module, kernel: Attention, device: torch.device) -> None:
    """Let the network compute attention with this kernel, in place. `auto` leaves diffusers' own choice.

    Networks whose attention goes through diffusers' dispatcher (Flux, Wan, Qwen-Image, Z-Image and later ones) take
    every kernel. Those that call torch's attention themselves (UNets, DiT, PixArt, SD3, Sana) take torch's and
    xformers'. diffusers keeps the dispatcher's choice once for the process, so a run has one kernel for all networks.

    Raises:
        UserError: the kernel's package is missing, the device is none for it, or the network does not take it.
    """
    if kernel == "auto":
        return
    _require(kernel, device)
    if _dispatches(network):
        _set_dispatched(network, {"sdpa": "native"}.get(kernel, kernel))
    elif kernel == "xformers":
        _set_xformers(network)
    elif kernel != "sdpa":
        allowed = "auto, sdpa and xformers"
        raise UserError(f"memory.attention: {kernel} given, but {type(network).__name__} takes {allowed} only")


def _require(kernel: str, device: torch.device) -> None:
    if kernel not in PACKAGES:
        return
    module, package = PACKAGES[kernel]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"memory.attention: {kernel} given, but {package} is not installed; pip install {package}")
    if device.type != "cuda":
        raise UserError(f"memory.attention: {kernel} given, but it runs on CUDA only, and this run is on {device.type}")


def _dispatches(network: nn.Module) -> bool:
    """Whether a processor of the network has a back end to choose, by what diffusers' own switch looks for."""
    processors = (getattr(module, "processor", None) for module in network.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _set_dispatched(network: Any, backend: str) -> None:
    log = logging.getLogger("diffusers.models.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)  # "experimental", every time
    try:
        network.set_attention_backend(backend)
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"memory.attention: {backend} given: {_first(error)}") from error
    finally:
        log.setLevel(level)


def _set_xformers(network: Any) -> None:
    try:
        network.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UserError(f"memory.attention: xformers given, but it cannot run here: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
