"""The ceilings of this machine, measured in the same run as what is held against them."""

from __future__ import annotations

import torch

from errseg.bench.cases import Counts
from errseg.bench.clock import Clock, cpu_cache_bytes
from errseg.bench.precision import EXACT, Precision

Ceilings = dict[str, float]


def measure_ceilings(device: torch.device, precision: Precision, clock: Clock, quick: bool = False) -> Ceilings:
    """Bytes/s of a large copy, FLOP/s of a large product in the precision and of one in strict float32.

    The copy counts bytes read and bytes written. The strict product stands for the units of ordinary arithmetic.
    """
    return {
        "copy_bytes_per_s": _copy(device, clock, quick),
        "matmul_flops_per_s": _matmul(device, precision, clock, quick),
        "vector_flops_per_s": _matmul(device, EXACT, clock, quick),
    }


def floor_ms(counts: Counts, ceilings: Ceilings) -> float:
    """The time below which no version can run: arithmetic and traffic overlap, the longest counts."""
    seconds = max(
        counts.matmul / ceilings["matmul_flops_per_s"],
        counts.vector / ceilings["vector_flops_per_s"],
        counts.bytes / ceilings["copy_bytes_per_s"],
    )
    return 1e3 * seconds


def _fastest(clock: Clock, call: object, repeats: int) -> float:
    """Seconds of the best of a few calls, after two that warm up: a ceiling is what was reached once."""
    assert callable(call)
    return min([clock.time(lambda _: call())[0] for _ in range(repeats + 2)][2:]) / 1e3


def _copy(device: torch.device, clock: Clock, quick: bool) -> float:
    cache = cpu_cache_bytes()
    size = (2 << 30) if device.type == "cuda" else (cache if quick else 4 * cache)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(clock, lambda: target.copy_(source), 5)


def _matmul(device: torch.device, precision: Precision, clock: Clock, quick: bool) -> float:
    side = 8192 if device.type == "cuda" else (512 if quick else 1536)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator).to(device, precision.products) for _ in range(2))
    calls = [lambda: left @ right]
    if device.type == "cpu" and precision.products == torch.float32 and torch.backends.mkldnn.is_available():
        # Which library is quicker depends on whose processor it is.
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    with precision.active(device.type), torch.no_grad():
        return 2 * side**3 / min(_fastest(clock, call, 5) for call in calls)
