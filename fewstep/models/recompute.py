"""Blocks that are computed again in the backward pass, in the setting that they were first computed in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch._C._functorch import peek_interpreter_stack
from torch.utils.checkpoint import checkpoint

from fewstep.models.graft import Scalars
from fewstep.models.lora import Adapters

_now = threading.local()


def recomputing() -> bool:
    """Whether this thread is computing a block again, so that hooks have seen the call before."""
    return getattr(_now, "recomputing", False)


@dataclass(frozen=True)
class Recompute:
    """What diffusers calls in place of a block: the block, keeping only what it was given for the backward pass.

    By then the network may have been called again, told other scalars and with another adapter. Both are put back for
    the second computation, which would otherwise give the gradients of another network without an error.

    Attributes:
        adapters: of the network.
        scalars: that its grafts read.
    """

    adapters: Adapters
    scalars: Scalars

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        if peek_interpreter_stack() is not None:
            return block(*args)  # a forward derivative, whose duals cannot be computed again later
        setting = self._setting()
        return checkpoint(
            block,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # networks are in eval mode: they draw nothing
            context_fn=lambda: (nullcontext(), setting()),
        )

    def _setting(self) -> Callable[[], Any]:
        """What restores the present setting, for as long as a block takes."""
        adapter, values = self.adapters.active, self.scalars.values

        @contextmanager
        def restored() -> Iterator[None]:
            other, others = self.adapters.active, self.scalars.values
            self.adapters.activate(adapter)
            self.scalars.values = values
            _now.recomputing = True
            try:
                yield
            finally:
                _now.recomputing = False
                self.scalars.values = others
                self.adapters.activate(other)

        return restored
