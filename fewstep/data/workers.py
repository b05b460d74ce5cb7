"""Processes that answer requests in turn, each over a pipe of its own.

torch's loader shares one queue between its workers: one that is killed while it writes leaves half a message there,
for which the run then waits for ever, and other deaths are raised from a signal handler, in whatever line the run
happens to be. Here the end of a worker is the end of its pipe, seen when its answer is due.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from fewstep.data.faults import DataFault

_AHEAD = 2  # requests a worker holds before their answers are asked for

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


def answers(answer: Callable[[Request], Answer], requests: Iterator[Request], workers: int) -> Iterator[Answer]:
    """The answers to endless `requests`, in their order, made ahead of time by `workers` processes.

    Requests and answers are pickled; a tensor among them would travel as a handle that dies with its worker.

    Raises:
        DataFault: a worker died.
    """
    crew: list[_Worker] = []
    dismiss = partial(_dismiss, crew)
    try:
        for _ in range(workers):
            crew.append(_hire(answer, [worker.pipe for worker in crew]))
        atexit.register(dismiss)  # before multiprocessing asks its children to end, which these do not hear
        for worker in crew * _AHEAD:
            _ask(worker, next(requests))
        for worker in cycle(crew):
            made = _reply(worker)
            _ask(worker, next(requests))
            yield made
    finally:
        atexit.unregister(dismiss)
        dismiss()


def _hire(answer: Callable[[Request], Answer], others: Sequence[Connection]) -> _Worker:
    """Start a worker: forked where that is safe and cheap, as they use single-threaded code and no device."""
    forked = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else None)
    ours, its = context.Pipe()
    inherited = (*others, ours) if forked else ()
    process = context.Process(target=_serve, args=(answer, its, inherited), daemon=True)
    with warnings.catch_warnings():  # Python warns about any fork beside threads
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        process.start()
    its.close()
    return _Worker(process, ours)


def _serve(answer: Callable[[Request], Answer], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """A worker's life: as long as the other end of its pipe is open, and deaf to what asks the run to stop.

    The run itself decides when it stops, and needs data until it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send(answer(pipe.recv()))
    except (EOFError, ConnectionError):
        return


def _ask(worker: _Worker, request: object) -> None:
    try:
        worker.pipe.send(request)
    except ConnectionError as error:
        raise _died(worker) from error


def _reply(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError) as error:  # also a message that breaks off
        raise _died(worker) from error


def _died(worker: _Worker) -> DataFault:
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    memory = "; out of memory?" if code == -signal.SIGKILL else ""
    return DataFault(f"a data loader worker died ({how}{memory}); lower data.workers, or see why with data.workers=0")


def _dismiss(crew: Sequence[_Worker]) -> None:
    """End all workers at once; they hold nothing that could be lost."""
    for worker in crew:
        worker.pipe.close()
        worker.process.kill()
    for worker in crew:
        worker.process.join()
