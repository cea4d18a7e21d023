"""Shared by the Triton kernels: what a launch consists of, parts of a layer, and where bilinear taps lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LANGUAGE_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Config:
    """One shipped way to launch a kernel: the launch reads it, and so does the ahead-of-time check.

    ``arguments`` are those in front of the constants: the dtype of a pointer, or a typical integer.
    """

    kernel: Any
    arguments: tuple[torch.dtype | int, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # given, ptxas no longer spills for the sake of more warps per multiprocessor

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch: the constants and how it is compiled."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run on the current stream of the arguments' device."""
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: leave the current device alone
            self.kernel[grid](*arguments, **self.options)


def padded(size: int, smallest: int = 16) -> int:
    """The power of two, of at least ``smallest``, that a tile needs for ``size``."""
    return max(smallest, triton.next_power_of_2(size))


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a b``, summed in its dtype."""
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def normalized(x, C: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of rows without its affine part, their means, and one over their deviations; ``x`` is zero past C."""
    mean = tl.sum(x, 1) / C
    centred = tl.where((tl.arange(0, x.shape[1]) < C)[None, :], x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * inverse[:, None], mean, inverse


@triton.jit
def relu6(x):
    """Clipped to [0, 6]; NaN stays NaN."""
    return tl.clamp(x, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)


# Output pixel y of H looks at (y + 1/2) h / H - 1/2 of h. Between the centres j and j + 1 lies interval j, and
# every output lies in exactly one of the intervals -1 .. h - 1. Integers keep interval and weight exact; int32 holds
# them up to triton_backend.MAX_SIDE.


@triton.jit
def first_in_interval(j, in_size, out_size):
    """The first output pixel of interval ``j``, clipped to [0, out_size]."""
    numerator = tl.maximum((2 * j + 1) * out_size - in_size, 0)
    return tl.minimum((numerator + 2 * in_size - 1) // (2 * in_size), out_size)


@triton.jit
def interval_of(x, in_size, out_size):
    """The interval that output pixel ``x`` lies in."""
    return ((2 * x + 1) * in_size + out_size) // (2 * out_size) - 1


@triton.jit
def far_weight(x, j, in_size, out_size, dtype: tl.constexpr):
    """Weight in [0, 1] of tap ``j + 1`` for output pixel ``x`` of interval ``j``; the edge repeats its pixel."""
    numerator = (2 * x + 1) * in_size - (2 * j + 1) * out_size
    weight = numerator.to(dtype) / (2 * out_size).to(dtype)
    return tl.where(j < 0, 1.0, tl.where(j >= in_size - 1, 0.0, weight)).to(dtype)
