"""Times of single calls with a cold cache: `perf_counter` on the CPU, events on a GPU."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

DEFAULT_CPU_CACHE = 64 << 20  # bytes, where the system does not tell
DEFAULT_GPU_CACHE = 64 << 20

Step = Callable[[Any], Any]


class Clock(Protocol):
    """Runs steps one after another from a cold cache; each gets the result of the one before."""

    def time(self, *steps: Step) -> list[float]:
        """Milliseconds of each step."""
        ...

    def wait(self) -> None:
        """Until the device has done everything."""
        ...


class CpuClock:
    """Wall-clock time; before it starts, a buffer of twice the last-level cache is rewritten."""

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.flushed = torch.zeros(2 * (cache_bytes or cpu_cache_bytes()) // 4)

    def flush(self) -> None:
        self.flushed.add_(1.0)

    def time(self, *steps: Step) -> list[float]:
        self.flush()
        marks, result = [time.perf_counter()], None
        kept = []  # freed behind the last mark
        for step in steps:
            result = step(result)
            marks.append(time.perf_counter())
            kept.append(result)
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]

    def wait(self) -> None:
        pass


class CudaClock:
    """Time between CUDA events; the L2 cache is overwritten first, which also hides the first launch."""

    def __init__(self, device: torch.device, cache_bytes: int | None = None) -> None:
        self.device = device
        size = cache_bytes or torch.cuda.get_device_properties(device).L2_cache_size or DEFAULT_GPU_CACHE
        self.flushed = torch.zeros(size, dtype=torch.int32, device=device)  # four times the cache

    def flush(self) -> None:
        self.flushed.zero_()

    def time(self, *steps: Step) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        result = None
        kept = []
        self.flush()
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            result = step(result)
            event.record()
            kept.append(result)
        self.wait()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def cpu_cache_bytes() -> int:
    """Bytes of the largest cache of a core, or a generous guess."""
    sizes = [DEFAULT_CPU_CACHE] if not _CACHES.is_dir() else [0]
    for file in _CACHES.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM])", file.read_text().strip()):
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes) or DEFAULT_CPU_CACHE


_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a series."""

    median: float
    q1: float
    q3: float
    count: int

    @property
    def iqr(self) -> float:
        """Distance of the quartiles."""
        return self.q3 - self.q1


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; raises ValueError for an empty series."""
    if not values:
        raise ValueError("expected at least one measurement, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, len(values))
