"""No step waits for its device: nothing in it is read back to the host, and nothing is made there and sent."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import five_modes
from fewstep.diffusion.process import Flow
from fewstep.training.assemble import assemble
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.training.runs import METHODS, begin, config, go, vector_denoiser

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
         "is_nonzero", "bincount", "repeat_interleave", "linalg_eigvals"}  # fmt: skip
"""Operations whose result's value or size the host must know."""

SENDS = {"lift_fresh"}
"""What `torch.tensor` and its like do with numbers of the host: on a device, a copy that the host waits for."""

TO_PYTHON = {"tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "__array__"}
"""Ways of reading that go past the dispatcher on a CPU."""


def _address(generator: Any) -> int:
    return generator._cdata


class _Host:
    """The tensors that never leave the host: drawn from its own generator, or computed from such alone."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.kept: dict[int, Tensor] = {}

    def owns(self, generator: torch.Generator | None, given: list[Tensor]) -> bool:
        drawn = generator is not None and _address(generator) == _address(self.generator)
        return drawn or (bool(given) and all(id(one) in self.kept for one in given))

    def keep(self, out: Any) -> None:
        self.kept.update({id(one): one for one in tree_leaves(out) if isinstance(one, Tensor)})


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str], host: _Host) -> None:
        super().__init__()
        self.found, self.host = found, host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in TO_PYTHON and not self.host.owns(None, list(args[:1])):
            self.found.append(_place(func.__name__))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Notes operations that would wait; what was drawn from the host's own stream, and follows from it, may be read."""

    def __init__(self, found: list[str], host: _Host) -> None:
        super().__init__()
        self.found, self.host = found, host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = kwargs or {}
        given = [one for one in tree_leaves((args, words)) if isinstance(one, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        on_host = self.host.owns(words.get("generator"), given)
        if not on_host and (name in READS | SENDS or (name.startswith("index") and _by_mask(args))):
            self.found.append(_place(name))
        out = func(*args, **words)
        if on_host:
            self.host.keep(out)
        return out


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose true entries the host must count."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices)


def _place(what: str) -> str:
    """The operation, and the line of this project that called it."""
    frames = [f for f in traceback.extract_stack() if "fewstep" in f.filename or "/methods/" in f.filename]
    return f"{what} at {frames[-1].filename}:{frames[-1].lineno}" if frames else what


@contextmanager
def reads(generator: torch.Generator) -> Iterator[list[str]]:
    """Inside, every read of a tensor is noted down, but for what comes from the host's `generator`."""
    found: list[str] = []
    host = _Host(generator)
    with _Functions(found, host), _Operations(found, host):
        yield found


def ready(state: TrainState, steps: int) -> TrainState:
    """The state with its batches at hand: to prepare them is work of the host."""
    batches = [state.next_batch() for _ in range(steps)]
    state._batches = iter(batches)
    return state


@pytest.mark.parametrize("name", METHODS)
def test_no_step_is_read_back(name, tmp_path):
    """Of any kind; the first two fill the tables that later steps keep."""
    state = ready(begin(config(METHODS[name], tmp_path, train={"steps": 14})), 14)
    go(state, 2)
    with reads(state.rng._host) as found:
        turns = {report.turn for report in go(state)}
    assert found == []
    assert turns == {state.method.turn(step).name for step in range(2, 14)}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: float(x.sum()), "__float__"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x * torch.tensor(2.0), "lift_fresh"),
        (lambda x: 1 if x.any() else 0, "__bool__"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.masked_select(x, x > 0), "masked_select"),
    ],
)
def test_the_search_for_reads_sees_them(call, name):
    x = torch.randn(4)
    with reads(torch.Generator()) as found:
        call(x)
    assert any(one.startswith(name) for one in found)


def test_what_the_host_draws_for_itself_may_be_read():
    generator = torch.Generator().manual_seed(0)
    with reads(generator) as found:
        rows = torch.randint(5, (8,), generator=generator)
        assert 0 <= int((rows < 3).sum()) <= 8
        assert len((rows < 3).nonzero()) <= 8
    assert found == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_cuda(name, tmp_path):
    """torch's own alarm; the first steps fill caches and compile kernels, the later ones are held to it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    mixture = five_modes(labelled=True)
    start = Sources(MixtureSet(mixture), mixture.denoiser(Flow()), vector_denoiser().to("cuda"))
    state = ready(assemble(config(METHODS[name], tmp_path, train={"steps": 14}), start, Accelerator()), 14)
    go(state, 7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        go(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        AcceleratorState._reset_state(True)
