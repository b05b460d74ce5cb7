"""A student's weights as a plain network, without adapters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.lora import BASE


@torch.no_grad()
def plain_network(student: NetworkDenoiser) -> nn.Module:
    """A float32 copy of the student's network on the CPU, its adapter added to the weights and no other kept.

    An adapter adds B·A·x beside W·x; W + B·A gives the same up to rounding.
    """
    from peft.tuners.lora import LoraLayer

    network = copy.deepcopy(student.network).float().cpu()
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        if student.adapter != BASE:
            layer.merge(adapter_names=[student.adapter])
        network.set_submodule(name, layer.get_base_layer())
    network.requires_grad_(False)
    # Files hold tensors row by row, whatever order the convolutions were trained in.
    return network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def store_weights_as(network: nn.Module, dtype: torch.dtype) -> None:
    """Give the network's parameters another dtype, in place, for a file."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round the network's parameters to what a file in `dtype` will hold; they keep their own dtype."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
