"""Several processes of one run, forked: torch is imported already, and a test's process has no thread of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fewstep.config import RunConfig
from fewstep.training.assemble import assemble
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.training.runs import sources


def begin_rank(run: RunConfig, start: Sources | None = None) -> TrainState:
    """The state at step 0 in one of the group's processes: all of accelerate that training asks for, at once."""
    rank = dist.get_rank()
    accelerator: Any = SimpleNamespace(
        num_processes=dist.get_world_size(),
        process_index=rank,
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )
    return assemble(run, start or sources(), accelerator)


def launch(task: Callable[[Path], None], folder: Path, count: int = 2, seconds: float = 240) -> list[int | None]:
    """Run `task(folder)` in `count` processes that form a gloo group; their exit codes, None of one that hangs."""
    folder.mkdir(exist_ok=True)
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_one, args=(task, folder, rank, count)) for rank in range(count)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(seconds)
    codes = [one.exitcode for one in ranks]
    for one in ranks:
        one.kill()
        one.join()
    return codes


def _one(task: Callable[[Path], None], folder: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    task(folder)
    dist.destroy_process_group()
