"""Signals that ask a run to stop, heard between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from fewstep.training.loop import TrainState
from fewstep.training.processes import true_in_any

STOP = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Inside, SIGTERM and SIGINT are noted instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        self._heard: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """Of the signal that was heard; another process may have heard it."""
        return "stopped" if self._heard is None else f"stopped by {self._heard.name}"

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {one: signal.signal(one, self._hear) for one in STOP}
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._heard = signal.Signals(number)
        self.__exit__()

    def agreed(self, state: TrainState, step: int) -> bool:
        """Whether to stop after `step`.

        Several processes ask each other, and only at every `train.log_every`th step: a signal reaches them at
        different times, and all must save the same step.
        """
        if state.accelerator.num_processes == 1:
            return self._heard is not None
        if step % state.config.train.log_every:
            return False
        return true_in_any(self._heard is not None, state.accelerator.device)
