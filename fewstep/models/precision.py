"""Networks in bfloat16: weights kept as mixed precision computes with them anyway, and times that are not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fewstep.models.families import Family

_FUNCTIONS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
}


def keep_in_bfloat16(network: nn.Module, family: Family, but: Collection[int]) -> None:
    """Keep the weights of linear layers and convolutions in bfloat16. In place: parameters stay the same objects.

    Mixed precision rounds these weights at every call, so under it the output is what it was to the bit. What it leaves
    in float32 stays so: norms, embeddings, tables and buffers. So do adapters, which are small and learn from zero, and
    the layers that embed times and the very first one, to whose precision diffusers rounds sines of times. Where mixed
    precision is off, as in derivatives, layers compute in float32.

    Args:
        network: in float32.
        family: of the network.
        but: ids of the parameters that stay, such as averages.
    """
    first = next(network.named_parameters())[0].rpartition(".")[0]
    for name, module in network.named_modules():
        stays = name == first or ".lora_" in f".{name}" or family.time_embedding in name.split(".")
        if isinstance(module, nn.Linear | _ConvNd) and not stays:
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in but:
                    parameter.data = parameter.data.to(torch.bfloat16)
    if not isinstance(network.forward, _Widened):
        network.forward = _Widened(network, network.forward)


def keep_times(network: nn.Module, family: Family) -> None:
    """Keep mixed precision from rounding the time where a network casts it to the precision of its samples. In place.

    bfloat16 would merge flow times within 1/512 at t = 0.5. The samples go on in float32 instead, which costs little:
    norms have them in float32 in any case, and layers round them again.
    """
    if family.first_layer is not None:
        network.get_submodule(family.first_layer).register_forward_hook(_in_full)


def _in_full(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return _widened(output)


def is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter is kept in bfloat16."""
    return parameter.dtype == torch.bfloat16


@dataclass(frozen=True, eq=False)
class _Widened:
    """A network's forward pass, with float32 copies of its weights where mixed precision makes none in bfloat16.

    Attributes:
        network: that it is the pass of; a deep copy of the network copies this with it.
        plain: the pass.
    """

    network: nn.Module
    plain: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pass."""
        if _is_mixed(next(self.network.parameters()).device.type):
            return self.plain(*args, **kwargs)
        with _InFloat32():
            return self.plain(*args, **kwargs)


def _is_mixed(device: str) -> bool:
    """Whether mixed precision is on; a dry run, on the meta device, imitates it but for forward derivatives."""
    return peek_interpreter_stack() is None if device == "meta" else torch.is_autocast_enabled(device)


class _InFloat32(TorchFunctionMode):
    """Inside, layers that are given anything in bfloat16 compute in float32."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        if func in _FUNCTIONS:
            args, words = tree_map(_widened, (args, words))
        return func(*args, **words)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
