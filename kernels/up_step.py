"""A step of the up-decoder in five launches: convolution, norm, convolution, norm, and the end of the latter.

A convolution is a sum of products, one per tap: a program owns a tile of pixels and keeps all of their output channels
in registers. Twice as large a map is made phase by phase, each a 2x2 convolution of the smaller one. What a
convolution writes is raw: mean and spread of a map are known only when all of it is there. So each program leaves
mean and squared deviations of its pixels, one program per map merges them, and whoever reads the map next normalises
it on the way. Nothing is atomic, every sum has a fixed order.

The backward pass has no kernels: it keeps the inputs alone, runs the reference once more, and leaves the gradients to
PyTorch, whose settings for its convolutions (TF32, determinism) then hold.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, padded, product
from errseg.ops import reference


@triton.jit
def _normalized(raw, scale, shift):
    """GroupNorm and ReLU; NaN stays NaN."""
    y = raw * scale + shift
    return tl.where(y < 0.0, 0.0, y)


@triton.jit(do_not_specialize=["height", "width", "classes"])
def _up_step_conv_kernel(
    source,  # [N, H, W, C]
    weights,  # [SCALE^2 phases, taps, CHANNELS, OUTPUTS], zeros beyond C and C'
    beside,  # of the FIRST: what is added, [N / classes, H', W', C']; else the source's norms, [N, 2, CHANNELS]
    raw,  # [N, H', W', C'], H' = SCALE H
    parts,  # [programs, 2, OUTPUTS]: mean and squared deviations of a program's pixels
    height,
    width,
    classes,
    C: tl.constexpr,
    OUT: tl.constexpr,
    FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    SIDE: tl.constexpr = 3 if SCALE == 1 else 2  # of a window
    STEPS: tl.constexpr = CHANNELS // STEP
    tile, phase = tl.program_id(0) // (SCALE * SCALE), tl.program_id(0) % (SCALE * SCALE)
    phase_y, phase_x = phase // SCALE, phase % SCALE
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    image = (tile // (across * down)).to(tl.int64)
    first_y, first_x = tile // across % down * ROWS, tile % across * COLUMNS
    p, s, o = tl.arange(0, ROWS * COLUMNS), tl.arange(0, STEP), tl.arange(0, OUTPUTS)
    y, x = first_y + p // COLUMNS, first_x + p % COLUMNS

    source += image * height * width * C
    weights += phase * SIDE * SIDE * CHANNELS * OUTPUTS
    norms = beside + image * 2 * CHANNELS
    total = tl.zeros((ROWS * COLUMNS, OUTPUTS), SUM)
    for i in range(SIDE * SIDE * STEPS):
        tap, c = i // STEPS, i % STEPS * STEP + s
        near_y, near_x = y + tap // SIDE + phase_y - 1, x + tap % SIDE + phase_x - 1
        there = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
        inside = there[:, None] & (c < C)[None, :]
        window = tl.load(source + (near_y * width + near_x)[:, None] * C + c[None, :], mask=inside, other=0.0)
        if not FIRST:  # beyond the edges are zeros, not what a norm makes of them
            scale, shift = tl.load(norms + c)[None, :], tl.load(norms + CHANNELS + c)[None, :]
            window = tl.where(inside, _normalized(window.to(SUM), scale, shift), 0.0).to(source.dtype.element_ty)
        weight = tl.load(weights + (i * STEP + s)[:, None] * OUTPUTS + o[None, :])
        total = product(window, weight, total, PRECISION)

    there = ((y < height) & (x < width))[:, None]
    inside = there & (o < OUT)[None, :]
    pixel = (y * SCALE + phase_y) * (width * SCALE) + x * SCALE + phase_x
    place = pixel[:, None] * OUT + o[None, :]
    size = height.to(tl.int64) * width * (SCALE * SCALE * OUT)
    if FIRST:
        total += tl.load(beside + image // classes * size + place, mask=inside, other=0.0).to(SUM)
    tl.store(raw + image * size + place, total.to(raw.dtype.element_ty), mask=inside)

    count = tl.minimum(ROWS, height - first_y) * tl.minimum(COLUMNS, width - first_x)
    mean = tl.sum(tl.where(there, total, 0.0), 0) / count.to(SUM)
    deviation = tl.where(there, total - mean[None, :], 0.0)
    part = parts + tl.program_id(0).to(tl.int64) * (2 * OUTPUTS) + o
    tl.store(part, mean)
    tl.store(part + OUTPUTS, tl.sum(deviation * deviation, 0))


@triton.jit(do_not_specialize=["height", "width"])
def _up_step_norm_kernel(
    parts,  # [N, programs of a map, 2, OUTPUTS]
    weight,  # [C']
    bias,  # [C']
    norms,  # [N, 2, OUTPUTS]: what a raw value is multiplied with, and what is added then
    height,  # of the maps that the convolution read
    width,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    programs = across * down * (SCALE * SCALE)
    t, o = tl.arange(0, PARTS), tl.arange(0, OUTPUTS)
    parts += image * programs * (2 * OUTPUTS)
    number = (height * width * (SCALE * SCALE)).to(SUM)

    total = tl.zeros((OUTPUTS,), SUM)
    for first in range(0, programs, PARTS):
        count = _pixels(first + t, programs, across, height, width, SCALE, ROWS, COLUMNS).to(SUM)
        rows = parts + (first + t)[:, None] * (2 * OUTPUTS) + o[None, :]
        means = tl.load(rows, mask=(first + t < programs)[:, None], other=0.0)
        total += tl.sum(count[:, None] * means, 0)
    mean = total / number
    squares = tl.zeros((OUTPUTS,), SUM)
    for first in range(0, programs, PARTS):
        count = _pixels(first + t, programs, across, height, width, SCALE, ROWS, COLUMNS).to(SUM)
        rows = parts + (first + t)[:, None] * (2 * OUTPUTS) + o[None, :]
        inside = (first + t < programs)[:, None]
        distance = tl.load(rows, mask=inside, other=0.0) - mean[None, :]
        spread = tl.load(rows + OUTPUTS, mask=inside, other=0.0)
        squares += tl.sum(spread + count[:, None] * distance * distance, 0)

    same = (o[:, None] // GROUP == o[None, :] // GROUP) & (o < OUT)[None, :]
    group_mean = tl.sum(tl.where(same, mean[None, :], 0.0), 1) / GROUP
    distance = mean - group_mean
    variance = squares / number + distance * distance  # of a channel about its group's mean
    variance = tl.sum(tl.where(same, variance[None, :], 0.0), 1) / GROUP
    there = o < OUT
    scale = tl.load(weight + o, mask=there, other=0.0).to(SUM) / tl.sqrt(variance + EPS)
    shift = tl.load(bias + o, mask=there, other=0.0).to(SUM) - group_mean * scale
    norm = norms + image * (2 * OUTPUTS) + o
    tl.store(norm, tl.where(there, scale, 0.0))
    tl.store(norm + OUTPUTS, tl.where(there, shift, 0.0))


@triton.jit
def _pixels(program, programs, across, height, width, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many pixels programs of a map had; none beyond the last of them."""
    tile = program // (SCALE * SCALE)
    rows = tl.minimum(ROWS, height - tile // across * ROWS)
    columns = tl.minimum(COLUMNS, width - tile % across * COLUMNS)
    return tl.where(program < programs, rows * columns, 0)


@triton.jit(do_not_specialize=["size"])
def _up_step_finish_kernel(
    raw,  # [N, size, C']: normalised where it lies
    norms,  # [N, 2, OUTPUTS]
    size,
    OUT: tl.constexpr,
    SUM: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    blocks = tl.cdiv(size, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p, o = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS), tl.arange(0, OUTPUTS)
    inside = (p < size)[:, None] & (o < OUT)[None, :]
    place = raw + image * size * OUT + p[:, None] * OUT + o[None, :]
    norm = norms + image * (2 * OUTPUTS) + o
    value = tl.load(place, mask=inside, other=0.0).to(SUM)
    value = _normalized(value, tl.load(norm)[None, :], tl.load(norm + OUTPUTS)[None, :])
    tl.store(place, value.to(raw.dtype.element_ty), mask=inside)


# Rows and columns of a tile, channels of a step; float32, whose operands are split in two, has room for fewer.
_TILES = {
    torch.float32: ((8, 8), 32),
    torch.bfloat16: ((8, 16), 64),
    torch.float16: ((8, 16), 64),
    torch.float64: ((4, 8), 16),
}
_TYPICAL = (40, 40)  # H, W


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _conv(dtype: torch.dtype, channels: int, outputs: int, first: bool, scale: int) -> Config:
    (rows, columns), step = _TILES[dtype]
    total = _sum_dtype(dtype)
    constants = {
        "C": channels,
        "OUT": outputs,
        "FIRST": first,
        "SCALE": scale,
        "SUM": LANGUAGE_DTYPE[total],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "ROWS": rows,
        "COLUMNS": columns,
        "CHANNELS": padded(channels),
        "STEP": min(step, padded(channels)),
        "OUTPUTS": padded(outputs),
    }
    beside = dtype if first else total
    return Config(
        _up_step_conv_kernel,
        (dtype, dtype, beside, dtype, total, *_TYPICAL, 48),
        constants,
        num_warps=8 if outputs > 64 else 4,
        num_stages=2,
        max_registers=255 if dtype.itemsize > 2 else None,
    )


@functools.cache
def _norm(dtype: torch.dtype, outputs: int, groups: int, eps: float, scale: int) -> Config:
    (rows, columns), _ = _TILES[dtype]
    total = _sum_dtype(dtype)
    constants = {
        "OUT": outputs,
        "GROUP": outputs // groups,
        "EPS": eps,
        "SCALE": scale,
        "SUM": LANGUAGE_DTYPE[total],
        "ROWS": rows,
        "COLUMNS": columns,
        "OUTPUTS": padded(outputs),
        "PARTS": 1024 // padded(outputs),
    }
    return Config(_up_step_norm_kernel, (total, dtype, dtype, total, *_TYPICAL), constants, num_warps=4)


@functools.cache
def _finish(dtype: torch.dtype, outputs: int) -> Config:
    total = _sum_dtype(dtype)
    block = padded(outputs)
    constants = {"OUT": outputs, "SUM": LANGUAGE_DTYPE[total], "PIXELS": 4096 // block, "OUTPUTS": block}
    return Config(_up_step_finish_kernel, (dtype, total, 1600), constants, num_warps=4)


_STEPS = {1: (64, 64, 1), 2: (64, 32, 2), 3: (32, 16, 2)}  # channels read and made, and by how much larger
_CHECKED = (  # ahead of time: few, since each takes a second or so
    *((torch.float32, 1), (torch.float32, 3)),
    *((torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 3)),
)
CONFIGS = {
    "norm": _norm(torch.float32, 64, 8, 1e-5, 1),
    "finish": _finish(torch.bfloat16, 64),
    **{f"first {dtype} {step}": _conv(dtype, *_STEPS[step][:2], True, _STEPS[step][2]) for dtype, step in _CHECKED},
    **{f"second {dtype} {step}": _conv(dtype, _STEPS[step][1], _STEPS[step][1], False, 1) for dtype, step in _CHECKED},
}


def forward(
    x: Tensor,
    added: Tensor,
    weight1: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight2: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """[B, K, H, W, C] -> [B, K, H', W', C']; see :func:`errseg.ops.up_step`."""
    maps = x.shape[:2].numel()
    out = x.new_empty((*x.shape[:2], *added.shape[1:]))
    if not out.numel():
        return out
    scale = 1 if weight1.ndim == 4 else 2
    raw = torch.empty_like(out)
    parts = _convolve(x.contiguous(), weight1, added.contiguous(), raw, True, scale)
    norms = _merged(parts, norm1_weight, norm1_bias, groups, eps, x, scale)
    parts = _convolve(raw, weight2, norms, out, False, 1)
    norms = _merged(parts, norm2_weight, norm2_bias, groups, eps, raw, 1)
    finish = _finish(x.dtype, out.shape[4])
    size = out.shape[2:4].numel()
    blocks = triton.cdiv(size, finish.constants["PIXELS"])
    finish.launch((maps * blocks,), out, norms, size)
    return out


def _convolve(source: Tensor, weight: Tensor, beside: Tensor, raw: Tensor, first: bool, scale: int) -> Tensor:
    """Fill `raw`; returns mean and squared deviations by map and program, [N, programs, 2, OUTPUTS]."""
    batch, classes, height, width, channels = source.shape
    config = _conv(source.dtype, channels, raw.shape[4], first, scale)
    constants = config.constants
    tiles = triton.cdiv(height, constants["ROWS"]) * triton.cdiv(width, constants["COLUMNS"])
    maps, programs = batch * classes, tiles * scale**2
    parts = source.new_empty((maps, programs, 2, constants["OUTPUTS"]), dtype=_sum_dtype(source.dtype))
    by_tap = _by_tap(weight, constants["CHANNELS"], constants["OUTPUTS"])
    config.launch((maps * programs,), source, by_tap, beside, raw, parts, height, width, classes)
    return parts


def _by_tap(weight: Tensor, channels: int, outputs: int) -> Tensor:
    """[..., C', C, y, x] -> [..., y, x, C, C'], with zeros up to whole blocks."""
    matrices = weight.movedim((-3, -4), (-2, -1))
    padding = 0, outputs - matrices.shape[-1], 0, channels - matrices.shape[-2]
    return F.pad(matrices, padding) if any(padding) else matrices.contiguous()


def _merged(parts: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, source: Tensor, scale: int) -> Tensor:
    """What norm and affine part multiply a raw map with and add to it, [N, 2, OUTPUTS]."""
    config = _norm(source.dtype, weight.shape[0], groups, eps, scale)
    norms = parts.new_empty((parts.shape[0], *parts.shape[2:]))
    arguments = parts, weight.contiguous(), bias.contiguous(), norms, *source.shape[2:4]
    config.launch((parts.shape[0],), *arguments)
    return norms


def backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the tensors where ``needed`` asks for them: the reference once more, and PyTorch's own gradients."""
    *tensors, groups, eps, needed = arguments
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        result = reference.up_step(*leaves, groups, eps)
        wanted = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
        found = iter(torch.autograd.grad(result, wanted, grad))
    return [next(found).contiguous() if n else grad.new_empty(0) for n in needed]
