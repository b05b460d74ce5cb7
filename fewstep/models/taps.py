"""Features from inside a network, without editing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.errors import UserError, did_you_mean
from fewstep.models.families import Family
from fewstep.models.recompute import recomputing


class _Enough(Exception):
    """Leaves a network whose remaining blocks nobody asked for."""


class FeatureTap:
    """Records what named sub-modules of a network put out, with its graph, so that gradient reaches the input.

    Images stay `(B, C, H, W)` and tokens `(B, N, D)`. Of a block that returns several things the last tensor counts:
    the image stream of blocks that return text and image (SD3, Flux, Qwen-Image), the hidden state of those that add
    a tuple of residuals (down blocks of UNets); `element` is for those that return the image first (CogVideoX). Blocks
    on one stream of text and image (Lumina2, Z-Image, FLUX.2's single ones) give the tokens of both.

    Make the tap before the network is compiled or first called: a compiled network does not see hooks that come
    later. Make it after copying the network, though: a deep copy keeps the hooks and would record here.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], element: int = -1) -> None:
        """Hooks on the sub-modules `names` of `module`, as in `module.named_modules()`.

        Args:
            module: the network.
            names: of its sub-modules.
            element: which tensor counts of those that one returns.

        Raises:
            UserError: there is no such sub-module, or no name at all.
        """
        found = dict(module.named_modules())
        _check(names, list(found))
        self.names, self.element, self._module = tuple(names), element, module
        self._features: dict[str, Tensor] = {}
        self.alone = False
        self._handles = [found[name].register_forward_hook(self._recorder(name)) for name in self.names]

    def _recorder(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if recomputing():
                return
            self._features[name] = _tensor_of(name, output, self.element)
            if self.alone and len(self._features) == len(self.names):
                raise _Enough

        return record

    def of(self, call: Callable[[], object]) -> tuple[Tensor, ...]:
        """The features of one call of the network, which ends where the last of them is there.

        What would come after them is not computed, unless the network is compiled: its code has no such exit.
        """
        self._features = {}  # another pass of the same network, the teacher's own, leaves some behind
        self.alone = not any(module._compiled_call_impl is not None for module in self._module.modules())
        try:
            call()
        except _Enough:
            pass
        finally:
            self.alone = False
        return self.take()

    def take(self) -> tuple[Tensor, ...]:
        """The features of the last forward pass, in the order of `names`; they are let go of here.

        Raises:
            UserError: nothing was recorded since the last call.
        """
        features, self._features = self._features, {}
        missing = [name for name in self.names if name not in features]
        if missing:
            mend = "call the network first, and make the tap before compiling it"
            raise UserError(f"taps: nothing recorded at {missing[0]!r}; {mend}")
        return tuple(features[name] for name in self.names)

    def remove(self) -> None:
        """Takes the hooks off the network again."""
        for handle in self._handles:
            handle.remove()
        self._features = {}


def block_names(network: nn.Module, family: Family) -> tuple[str, ...]:
    """Every block of a network, in the order they run in: the taps of LADD, one head each.

    A network whose family lists no blocks gives the parts of its bottleneck.
    """
    middle = family.tap(network)
    lists = family.compute_blocks or (middle,)
    names = [f"{place}.{i}" for place in lists for i, _ in enumerate(network.get_submodule(place).children())]
    if middle in names or not family.compute_blocks:
        return tuple(names)
    first_up = next((i for i, name in enumerate(names) if name.startswith("up")), len(names))
    return (*names[:first_up], middle, *names[first_up:])


def _tensor_of(name: str, output: Any, element: int) -> Tensor:
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        raise UserError(f"taps: {name!r} returns {type(output).__name__} without a tensor; tap one of its sub-modules")
    return tensors[element]


def _check(names: Sequence[str], found: list[str]) -> None:
    if not names:
        raise UserError("taps: no sub-module named, at least one is needed")
    for name in names:
        if name not in found:
            raise UserError(f"taps: no sub-module {name!r}{did_you_mean(name, found) or _children(found)}")


def _children(found: list[str]) -> str:
    return "; at the top there are " + ", ".join(name for name in found if name and "." not in name)
