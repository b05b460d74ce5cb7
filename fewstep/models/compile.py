"""torch.compile of a denoiser's network, whole or block by block, in place: the names of its weights stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewstep.models.denoiser import NetworkDenoiser

_VERSIONS = 64
"""Of the code of one class."""

Mode = Literal["none", "blocks", "whole", "graphs"]


def compile_network(denoiser: NetworkDenoiser, mode: Mode) -> None:
    """Compile in place. `blocks` compiles each block on its own, which is quick to compile and keeps hooks working.

    `graphs` is `whole` whose kernels CUDA starts as one recorded graph, for networks so small that starting them one by
    one takes longer than they do.
    """
    if mode == "none":
        return
    _tell_networks_apart()
    network = denoiser.network
    parts = _blocks(denoiser) if mode == "blocks" else [network]
    for part in parts:
        part.compile(mode="reduce-overhead" if mode == "graphs" else None)
    if mode == "graphs":
        assert network._compiled_call_impl is not None
        network._compiled_call_impl = _Copied(network._compiled_call_impl)
    # Its imports load torch's compiler, for which other runs should not wait.
    from fewstep.models.compiled_derivative import CompiledDerivative

    derivative = CompiledDerivative(network, denoiser.graft.scalars)
    for part in parts:
        derivative.attach(part)


def _blocks(denoiser: NetworkDenoiser) -> list[nn.Module]:
    lists = [denoiser.network.get_submodule(name) for name in denoiser.family.compute_blocks]
    return [block for one in lists for block in one.children()]


def _tell_networks_apart() -> None:
    """Let a class have more than the 8 versions of its code after which torch goes on eagerly, and check their hooks.

    A UNet's blocks are of few classes and of many widths, and each is run with and without gradient, by student and
    teacher, in training and for samples. Where one of them has a tap and another has none, torch would run the code of
    either in both, unless it is told to look.
    """
    settings: Any = import_module("torch._dynamo.config")
    settings.recompile_limit = max(settings.recompile_limit, _VERSIONS)
    settings.skip_nnmodule_hook_guards = False


@dataclass(frozen=True)
class _Copied:
    """A recorded network's call. Its next one writes to the memory of this one's output, so a copy is handed out.

    Attributes:
        replay: the call.
    """

    replay: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, its output in memory of its own."""
        return tree_map(_copied, self.replay(*args, **kwargs))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
