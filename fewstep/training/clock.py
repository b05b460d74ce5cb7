"""What a run's speed is made of, measured without waiting for the device while it trains."""

from __future__ import annotations

import sys
import time

import torch


class Clock:
    """Sums up the seconds that the device works between `start()` and `stop()`.

    On a GPU the marks are events in its own queue, which are read when the sum is asked for.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """For `device`; None: off, nothing is measured."""
        self._device, self._seconds, self._began = device, 0.0, 0.0
        self._events: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Here the stretch begins."""
        if self._on_gpu():
            self._mark()
        elif self._device is not None:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Here it ends."""
        if self._on_gpu():
            self._mark()
        elif self._device is not None:
            self._seconds += time.perf_counter() - self._began

    def read(self) -> float:
        """The seconds since the last reading; this waits for a GPU."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._seconds += sum(a.elapsed_time(b) for a, b in pairs) / 1000
            self._events = []
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _on_gpu(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


class Speed:
    """Figures of speed and memory from one line of the log to the next."""

    def __init__(self, clock: Clock, device: torch.device, step: int, batch_size: int) -> None:
        """Beginning at `step`, with `batch_size` images a step."""
        self._clock, self._device, self._batch_size = clock, device, batch_size
        self._step, self._since = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Of the steps since the last reading, with all that was done between them; this waits for a GPU."""
        at_work, now = self._clock.read(), time.perf_counter()
        seconds, images = now - self._since, (step - self._step) * self._batch_size
        self._step, self._since = step, now
        figures = {"speed/images_per_second": images / seconds, "speed/network_share": at_work / seconds}
        peak = peak_memory(self._device)
        return figures if peak is None else figures | {"speed/peak_memory_mb": peak}


def peak_memory(device: torch.device) -> float | None:
    """MiB: the most that was allocated on a GPU since the last reading, or that this process ever had in memory.

    None on a CPU whose system does not tell.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform not in ("linux", "darwin"):
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux
