"""Clocks, spreads, ceilings and memory."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from errseg.bench import clock as clocks
from errseg.bench.cases import Counts
from errseg.bench.clock import CpuClock, CudaClock, cpu_cache_bytes, spread
from errseg.bench.memory import process_peak, storage_peak
from errseg.bench.precision import EXACT
from errseg.bench.roofline import floor_ms, measure_ceilings
from errseg.bench.targets._ops import SMALL


def test_a_known_sleep_is_timed() -> None:
    def nap(result: object) -> str:
        time.sleep(0.03)
        return "rested"

    def use(result: object) -> None:
        assert result == "rested"
        time.sleep(0.01)

    first, second = CpuClock(1 << 16).time(nap, use)
    assert 30 <= first < 60 and 10 <= second < 40


def test_the_cache_is_flushed_before_every_call_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CpuClock(1 << 16)
    flushed = []

    def slowly() -> None:
        flushed.append(1)
        time.sleep(0.05)

    monkeypatch.setattr(clock, "flush", slowly)
    assert clock.time(lambda _: None)[0] < 40
    clock.time(lambda _: None, lambda _: None)
    assert len(flushed) == 2


def test_the_flushed_buffer_is_larger_than_the_cache() -> None:
    assert CpuClock().flushed.nbytes >= 2 * cpu_cache_bytes() >= 1 << 20


class _FakeEvent:
    log: list[str] = []
    time = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _FakeEvent.log.append("event")
        _FakeEvent.time += 2.0
        self.at = _FakeEvent.time

    def elapsed_time(self, other: _FakeEvent) -> float:
        return other.at - self.at


def test_gpu_times_lie_between_events_behind_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _FakeEvent.log = []
    fake = SimpleNamespace(Event=_FakeEvent, synchronize=lambda device: log.append("wait"))
    monkeypatch.setattr(clocks.torch, "cuda", fake)
    clock = CudaClock.__new__(CudaClock)
    clock.device = torch.device("cpu")
    clock.flush = lambda: log.append("flush")  # type: ignore[method-assign]
    times = clock.time(lambda _: log.append("forward"), lambda _: log.append("backward"))
    assert log == ["flush", "event", "forward", "event", "backward", "event", "wait"]
    assert times == [2.0, 2.0]


def test_spread() -> None:
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.q1, found.q3, found.iqr, found.count) == (3.0, 2.0, 4.0, 2.0, 5)
    assert spread([7.0]).iqr == 0.0
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_ceilings_are_measured_and_the_slowest_need_is_the_floor() -> None:
    ceilings = measure_ceilings(torch.device("cpu"), EXACT, CpuClock(1 << 20), quick=True)
    assert all(value > 1e7 for value in ceilings.values())
    known = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12, "vector_flops_per_s": 1e11}
    assert floor_ms(Counts(matmul=10**9, vector=10**8, bytes=10**6), known) == pytest.approx(1.0)
    assert floor_ms(Counts(matmul=10**9, vector=10**9, bytes=10**6), known) == pytest.approx(10.0)
    assert floor_ms(Counts(bytes=10**9), known) == pytest.approx(1000.0)


def test_storage_peak_counts_what_is_alive_together() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second.add(1)

    assert storage_peak(call) == 8000


def test_process_peak_sees_a_large_result() -> None:
    spec = {"target": "upsample_bce", "provider": "published", "passing": "both", "precision": "float32", "tf32": False}
    case = SMALL.to_dict() | {"words": 200, "size": 160}
    # Logits, targets and one-hot truth over all words: each [1, 200, 160, 160] float32.
    assert process_peak({**spec, "case": case}) > 3 * 200 * 160 * 160 * 4
