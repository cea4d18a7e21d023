"""Bilinear upsampling with aligned corners plus a residual, on token-major maps.

Forward reads four taps per output, from cache but for the first time, and everything else once. Backward gathers: a
program owns pixels of the small map and walks over the outputs that they took part in, so that sums have a fixed
order and nothing is written twice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, padded

# Output y of H looks at y (h - 1) / (H - 1) of h. Integers keep tap and weight exact.


@triton.jit
def _taps(y, in_size, out_size, DTYPE: tl.constexpr):
    """The two inputs that output ``y`` lies between, and the weight of the second."""
    span = tl.maximum(out_size - 1, 1)
    numerator = y * (in_size - 1)
    low = numerator // span
    weight = (numerator - low * span).to(DTYPE) / span.to(DTYPE)
    return low, tl.minimum(low + 1, in_size - 1), weight


@triton.jit
def _outputs(j, in_size, out_size):
    """The outputs that input ``j`` takes part in: from the first, up to and without the second."""
    span = tl.maximum(out_size - 1, 1)
    step = tl.maximum(in_size - 1, 1)
    first = tl.maximum((j * span - span + step) // step, 0)
    end = tl.minimum((j * span + span - 1) // step + 1, out_size)
    return first, tl.where(in_size == 1, out_size, end)


@triton.jit
def _share(y, j, in_size, out_size, DTYPE: tl.constexpr):
    """The weight of input ``j`` in output ``y``, both integers; at least zero."""
    span = tl.maximum(out_size - 1, 1)
    return tl.maximum(1.0 - tl.abs(y * (in_size - 1) - j * span).to(DTYPE) / span.to(DTYPE), 0.0)


@triton.jit(do_not_specialize=["in_height", "in_width", "height", "width"])
def _upsample_residual_fwd_kernel(
    x,  # [N, h, w, C]
    residual,  # [N, H, W, C]
    out,  # [N, H, W, C]
    in_height,
    in_width,
    height,
    width,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    blocks = tl.cdiv(width, COLUMNS)
    plane = (tl.program_id(0) // (blocks * height)).to(tl.int64)
    y = tl.program_id(0) // blocks % height
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (column < width)[:, None] & (c < C)[None, :]
    top, bottom, down = _taps(y, in_height, height, DTYPE)
    left, right, across = _taps(column, in_width, width, DTYPE)
    across = across[:, None]

    x += plane * in_height * in_width * C
    left, right = left[:, None] * C + c[None, :], right[:, None] * C + c[None, :]
    upper = x + top * in_width * C
    lower = x + bottom * in_width * C
    first = tl.load(upper + left, mask=inside, other=0.0).to(DTYPE) * (1 - across)
    first += tl.load(upper + right, mask=inside, other=0.0).to(DTYPE) * across
    second = tl.load(lower + left, mask=inside, other=0.0).to(DTYPE) * (1 - across)
    second += tl.load(lower + right, mask=inside, other=0.0).to(DTYPE) * across
    place = plane * height * width * C + (y * width + column[:, None]) * C + c[None, :]
    result = first * (1 - down) + second * down
    result += tl.load(residual + place, mask=inside, other=0.0).to(DTYPE)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["in_height", "in_width", "height", "width", "most"])
def _upsample_residual_bwd_kernel(
    grad,  # [N, H, W, C]
    x_grad,  # [N, h, w, C]
    in_height,
    in_width,
    height,
    width,
    most,  # outputs in a row that one input takes part in
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    blocks = tl.cdiv(in_width, COLUMNS)
    plane = (tl.program_id(0) // (blocks * in_height)).to(tl.int64)
    j = tl.program_id(0) // blocks % in_height
    i = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    grad += plane * height * width * C
    first_row, last_row = _outputs(j, in_height, height)
    first, last = _outputs(i, in_width, width)
    last = tl.where(i < in_width, last, first)
    total = tl.zeros((COLUMNS, CHANNELS), DTYPE)
    for y in range(first_row, last_row):
        row = tl.zeros((COLUMNS, CHANNELS), DTYPE)
        for t in range(most):
            column = first + t
            share = tl.where(column < last, _share(column, i, in_width, width, DTYPE), 0.0)
            inside = (column < last)[:, None] & (c < C)[None, :]
            place = (y * width + column[:, None]) * C + c[None, :]
            row += share[:, None] * tl.load(grad + place, mask=inside, other=0.0).to(DTYPE)
        total += _share(y, j, in_height, height, DTYPE) * row
    inside = (i < in_width)[:, None] & (c < C)[None, :]
    place = plane * in_height * in_width * C + (j * in_width + i[:, None]) * C + c[None, :]
    tl.store(x_grad + place, total.to(x_grad.dtype.element_ty), mask=inside)


@functools.cache
def _config(kernel: Any, dtype: torch.dtype, channels: int) -> Config:
    statistics = torch.promote_types(dtype, torch.float32)
    block = min(128, padded(channels))
    constants = {
        "C": channels,
        "COLUMNS": 2048 // block // (2 if dtype == torch.float64 else 1),
        "CHANNELS": block,
        "DTYPE": LANGUAGE_DTYPE[statistics],
    }
    if kernel is _upsample_residual_fwd_kernel:
        return Config(kernel, (dtype,) * 3 + (20, 20, 40, 40), constants, num_warps=4)
    return Config(kernel, (dtype,) * 2 + (20, 20, 40, 40, 5), constants, num_warps=4)


CONFIGS = {
    f"{name} {dtype}": _config(kernel, dtype, 128)
    for dtype in LANGUAGE_DTYPE
    for name, kernel in (("fwd", _upsample_residual_fwd_kernel), ("bwd", _upsample_residual_bwd_kernel))
}


def forward(x: Tensor, residual: Tensor) -> Tensor:
    """``residual`` plus the upsampled ``x``."""
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(residual)
    height, width, channels = residual.shape[2:]
    config = _config(_upsample_residual_fwd_kernel, x.dtype, channels)
    if out.numel():
        rows = x.shape[:2].numel() * height
        config.launch(_grid(config, rows, width), x, residual, out, *x.shape[2:4], height, width)
    return out


def backward(grad: Tensor, x: Tensor, residual: Tensor, needed: list[bool]) -> list[Tensor]:
    """The gradient of ``x``; that of the residual is the incoming one."""
    if not needed[0]:
        return [grad.new_empty(0)] * 2
    x_grad = x.new_empty(x.shape)
    if not grad.numel():
        return [x_grad.zero_(), grad.new_empty(0)]
    (in_height, in_width, channels), (height, width) = x.shape[2:], grad.shape[2:4]
    config = _config(_upsample_residual_bwd_kernel, x.dtype, channels)
    most = width if in_width == 1 else 2 * max(width - 1, 1) // (in_width - 1) + 1
    grid = _grid(config, x.shape[:2].numel() * in_height, in_width)
    config.launch(grid, grad.contiguous(), x_grad, in_height, in_width, height, width, most)
    return [x_grad, grad.new_empty(0)]


def _grid(config: Config, rows: int, width: int) -> tuple[int, int]:
    constants = config.constants
    return rows * triton.cdiv(width, constants["COLUMNS"]), triton.cdiv(constants["C"], constants["CHANNELS"])
