"""How the benchmark of a device measures: time, memory, waits of the host; and how it keeps to its nine minutes."""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}
"""Dense bfloat16 operations per second, from the makers' data sheets; the first name that fits counts."""

LEAST = 45.0
"""Seconds that a measurement has from its start, if the whole still has them: compilation may take so long."""

ENOUGH = 6.0
"""Seconds after which a measurement is not repeated any more."""


class OutOfTime(BaseException):
    """The benchmark's time is over. No `Exception`, which a compiler or an optimizer might take for its own."""


@dataclass
class Section:
    """Figures by name, and what the time did not reach.

    Attributes:
        ends: when nothing new is begun, by the monotonic clock.
        final: when what is under way is cut short.
        keep: is called after each measurement, to write down what there is.
    """

    ends: float
    final: float
    keep: Callable[[], None] = lambda: None
    figures: dict[str, Any] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)

    def measure(self, name: str, call: Callable[[], Any]) -> None:
        """Note down what the call returns, or in a line why it did not; or that the time was over."""
        now = time.monotonic()
        if now >= self.ends:
            self.not_reached.append(name)
            return
        try:
            with _limited(min(self.final, max(self.ends, now + LEAST)) - now):
                self.figures[name] = call()
        except OutOfTime:
            self.figures[name] = {"error": "cut short: its time was over"}
        except Exception as error:  # whatever it is, the others' figures are not lost for it
            self.figures[name] = {"error": told(error)}
        forget()
        print(f"{name}: {self.figures[name]}", flush=True)
        self.keep()


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def forget() -> None:
    """Give back what a measurement held: compiled code, and networks that point at each other."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside after so many seconds; the main thread only can."""

    def ring(_signal: int, _frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Bench:
    """Where and how it runs.

    Attributes:
        device: of everything.
        tiny: small networks and one repeat.
    """

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device to measure."""
        return self.device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of the call's time on the device, after one that warms it up."""
        call()
        found: list[float] = []
        most = 1 if self.tiny else 5
        while len(found) < most and (len(found) < 2 or sum(found) < ENOUGH):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def seconds_and_peak(self, call: Callable[[], object]) -> dict[str, Any]:
        """The median time, and the most memory that was held meanwhile; None on a CPU."""
        self.wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(call)
        peak = torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None
        return {"seconds": seconds, "peak_bytes": peak}

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def syncs(self, call: Callable[[], object]) -> int | None:
        """How often the host waits in the call; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in heard)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision on a device."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.on_gpu else nullcontext()

    def utilisation(self, flops: int, seconds: float) -> float | None:
        """The share of the device's peak; None for a device that is not in the table."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else ""
        peak = next((value for key, value in PEAK.items() if key in name), None)
        return None if peak is None else flops / seconds / peak


def uncompiled() -> AbstractContextManager[object]:
    """Inside, compiled modules run as they are: the counter of operations does not see into compiled code."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
