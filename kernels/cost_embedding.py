"""Two 7 x 7 convolutions to C channels, one of them at low resolution, as one product per pixel; and its gradients.

A program owns a tile of pixels of one map. It gathers the 7 x 7 values around each of them at 1/16, and around each of
the cells at 1/32 that the tile leans on. The latter are brought up to the pixels by a product with the bilinear
weights: convolution and upsampling are linear, and 49 values are less than C channels. Two products with the weights
then give the embedding, which is written once. A window is padded to 64 values, the last of them a one for the bias.

The gradients of the costs are products with 49 columns, kept in scratch and added up along the windows by a second
kernel. Those at 1/32 go through the same bilinear weights within the tile; cells that several tiles lean on are added
up in between. The gradients of weights and bias are sums over pixels, which a bounded number of programs keep in
registers and one more kernel adds up. They are not left to cuBLAS, because the windows would have to be written out for
it, as many bytes as the incoming gradient has. Every sum has a fixed order: nothing is atomic.

Scratch of the backward pass for 4 x 32 maps of 40 x 40 pixels, 128 channels, bfloat16: 17 MB of sums, given back before
41 MB of products at both scales; the incoming gradient has 52 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, first_in_interval, interval_of

LINE = tl.constexpr(8)  # a column of the window, padded
ROW = tl.constexpr(64)  # the window, column by column; in the last place of the padding a one for the bias
TAPS = tl.constexpr(49)


@triton.jit
def _tile(program, height, width, low_height, low_width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's map, the pixels of its tile, and the upper left one of the cells that they lean on.

    Pixels may lie beyond the edges, and so may the cell: then its weight is 0.
    """
    across = tl.cdiv(width, COLUMNS)
    tiles = across * tl.cdiv(height, ROWS)
    first_y = program % tiles // across * ROWS
    first_x = program % tiles % across * COLUMNS
    y, x = _block(first_y, first_x, ROWS, COLUMNS)
    top, left = interval_of(first_y, low_height, height), interval_of(first_x, low_width, width)
    return (program // tiles).to(tl.int64), y, x, top, left


@triton.jit
def _block(first_y, first_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pixels of a block."""
    p = tl.arange(0, ROWS * COLUMNS)
    return first_y + p // COLUMNS, first_x + p % COLUMNS


@triton.jit
def _places():
    """Which tap of the weights, row by row, is at each of the 64 places, and whether there is one."""
    place = tl.arange(0, ROW)
    column, row = place // LINE, place % LINE
    return row * 7 + 6 - column, (column < 7) & (row < 7)


@triton.jit
def _planes(products, image, tap, size):
    """Where the planes of the taps begin: [64, 1]."""
    return products + image * TAPS * size + (tap.to(tl.int64) * size)[:, None]


@triton.jit
def _windows(cost, y, x, height, width):
    """What lies around pixels, zeros beyond the edges: [pixels, 64]."""
    line = tl.arange(0, LINE)
    # Columns from right to left: consecutive pixels, not taps, then go to consecutive lanes, which share their masks.
    dy, dx = line - 3, 3 - line
    near_y, near_x = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
    inside_y = (near_y >= 0) & (near_y < height) & (line < 7)[None, :]
    inside_x = (near_x >= 0) & (near_x < width) & (line < 7)[None, :]
    rows = cost + (y * width + x)[:, None] + (dy * width)[None, :]
    places = rows[:, None, :] + dx[None, :, None]  # [pixels, 8 columns, 8 rows]
    last = ((line == 7)[:, None] & (line == 7)[None, :]).to(cost.dtype.element_ty)
    values = tl.load(places, mask=inside_y[:, None, :] & inside_x[:, :, None], other=last[None, :, :])
    return tl.reshape(values, (y.shape[0], ROW))


@triton.jit
def _position(pixel, first, in_size, out_size, dtype: tl.constexpr):
    """Where pixels lie among cells counted from ``first``, never beyond the centres of the outermost cells."""
    pixel = tl.minimum(pixel, out_size - 1)
    numerator = (2 * pixel + 1) * in_size - (2 * first + 1) * out_size
    position = numerator.to(dtype) * (0.5 / out_size.to(dtype))
    return tl.minimum(tl.maximum(position, -first.to(dtype)), (in_size - 1 - first).to(dtype))


@triton.jit
def _shares(position_y, position_x, first_y, first_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bilinear weights for pixels of a block of cells: [pixels, cells]."""
    cell_y, cell_x = first_y + tl.arange(0, ROWS), first_x + tl.arange(0, COLUMNS)
    share_y = tl.maximum(1.0 - tl.abs(position_y[:, None] - cell_y.to(position_y.dtype)[None, :]), 0.0)
    share_x = tl.maximum(1.0 - tl.abs(position_x[:, None] - cell_x.to(position_x.dtype)[None, :]), 0.0)
    return tl.reshape(share_y[:, :, None] * share_x[:, None, :], (position_y.shape[0], ROWS * COLUMNS))


@triton.jit
def _upsampled_windows(
    cost,
    y,
    x,
    top,
    left,
    height,
    width,
    low_height,
    low_width,
    cell_rows,
    cell_columns,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The windows of the low map, interpolated at pixels: [pixels, 64] in the dtype of the map."""
    dtype = cost.dtype.element_ty
    position_y = _position(y, top, low_height, height, SUM)
    position_x = _position(x, left, low_width, width, SUM)
    windows = tl.zeros((ROWS * COLUMNS, ROW), SUM)
    for i in tl.range(0, cell_rows, ROWS, num_stages=1):
        for j in tl.range(0, cell_columns, COLUMNS, num_stages=1):
            cell_y, cell_x = _block(top + i, left + j, ROWS, COLUMNS)
            cells = _windows(cost, cell_y, cell_x, low_height, low_width)
            share = _shares(position_y, position_x, i, j, ROWS, COLUMNS).to(dtype)
            windows = tl.dot(share, cells, windows, input_precision=PRECISION, out_dtype=SUM)
    return windows.to(dtype)


_VARIABLE = ["height", "width", "low_height", "low_width", "cell_rows", "cell_columns"]


@triton.jit
def _cost_embedding_pack_kernel(
    weight16,  # [C, 49]
    weight32,  # [C, 49]
    bias,  # [C]
    weights,  # [2, C, 64]
    channels,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    place = tl.arange(0, ROW)[None, :]
    tap, is_tap = _places()
    inside = (c < channels) & is_tap[None, :]
    row16 = tl.load(weight16 + c * TAPS + tap[None, :], mask=inside, other=0.0)
    row16 = tl.where(place == ROW - 1, tl.load(bias + c, mask=c < channels, other=0.0), row16)
    row32 = tl.load(weight32 + c * TAPS + tap[None, :], mask=inside, other=0.0)
    tl.store(weights + c * ROW + place, row16, mask=c < channels)
    tl.store(weights + (channels + c) * ROW + place, row32, mask=c < channels)


@triton.jit(do_not_specialize=_VARIABLE)
def _cost_embedding_fwd_kernel(
    cost16,  # [B K, H, W]
    cost32,  # [B K, h, w]
    weights,  # [2, C, 64]
    out,  # [B K, H, W, C]
    height,
    width,
    low_height,
    low_width,
    cell_rows,  # cells that a tile leans on
    cell_columns,
    channels,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    image, y, x, top, left = _tile(program, height, width, low_height, low_width, ROWS, COLUMNS)
    low = cost32 + image * low_height * low_width
    sizes = height, width, low_height, low_width, cell_rows, cell_columns
    coarse = _upsampled_windows(low, y, x, top, left, *sizes, SUM, PRECISION, ROWS, COLUMNS)
    fine = _windows(cost16 + image * height * width, y, x, height, width)

    inside = (y < height) & (x < width)
    pixel = (image * height + y) * width + x
    rows = out + pixel * channels
    place = tl.arange(0, ROW)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        there = (c < channels)[None, :]
        columns = weights + c[None, :] * ROW + place[:, None]  # [64, CHANNELS]
        weight16 = tl.load(columns, mask=there, other=0.0)
        weight32 = tl.load(columns + channels * ROW, mask=there, other=0.0)
        embedding = tl.dot(fine, weight16, input_precision=PRECISION, out_dtype=SUM)
        embedding = tl.dot(coarse, weight32, embedding, input_precision=PRECISION, out_dtype=SUM)
        tl.store(rows[:, None] + c[None, :], embedding.to(out.dtype.element_ty), mask=inside[:, None] & there)


@triton.jit(do_not_specialize=_VARIABLE)
def _cost_embedding_bwd_cost_kernel(
    grad,  # [B K, H, W, C]
    weights,  # [2, C, 64]
    products16,  # [B K, 49, H W]
    products32,  # [B K, tiles, 49, cells]
    height,
    width,
    low_height,
    low_width,
    cell_rows,
    cell_columns,
    channels,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    image, y, x, top, left = _tile(program, height, width, low_height, low_width, ROWS, COLUMNS)
    inside = ((y < height) & (x < width))[None, :]
    rows = grad + ((image * height + y) * width + x) * channels
    place = tl.arange(0, ROW)
    product16 = tl.zeros((ROW, ROWS * COLUMNS), SUM)
    product32 = tl.zeros((ROW, ROWS * COLUMNS), SUM)
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        there = c < channels
        tile = tl.load(rows[None, :] + c[:, None], mask=there[:, None] & inside, other=0.0)  # [CHANNELS, pixels]
        columns = weights + c[None, :] * ROW + place[:, None]  # [64, CHANNELS]
        weight16 = tl.load(columns, mask=there[None, :], other=0.0)
        weight32 = tl.load(columns + channels * ROW, mask=there[None, :], other=0.0)
        product16 = tl.dot(weight16, tile, product16, input_precision=PRECISION, out_dtype=SUM)
        product32 = tl.dot(weight32, tile, product32, input_precision=PRECISION, out_dtype=SUM)

    dtype = grad.dtype.element_ty
    tap, is_tap = _places()
    planes = _planes(products16, image, tap, height * width)
    tl.store(planes + (y * width + x)[None, :], product16.to(dtype), mask=is_tap[:, None] & inside)

    position_y = _position(y, top, low_height, height, SUM)
    position_x = _position(x, left, low_width, width, SUM)
    product32 = product32.to(dtype)
    parts = _planes(products32, program.to(tl.int64), tap, cell_rows * cell_columns)
    for i in tl.range(0, cell_rows, ROWS, num_stages=1):
        for j in tl.range(0, cell_columns, COLUMNS, num_stages=1):
            share = _shares(position_y, position_x, i, j, ROWS, COLUMNS).to(dtype)
            part = tl.dot(product32, share, input_precision=PRECISION, out_dtype=SUM)  # [64, cells]
            cell_y, cell_x = _block(i, j, ROWS, COLUMNS)
            there = (cell_y < cell_rows) & (cell_x < cell_columns)
            cells = parts + (cell_y * cell_columns + cell_x)[None, :]
            tl.store(cells, part.to(dtype), mask=is_tap[:, None] & there[None, :])


@triton.jit(do_not_specialize=_VARIABLE)
def _cost_embedding_bwd_merge_kernel(
    products32,  # [B K, tiles, 49, cells]
    merged,  # [B K, 49, h w]
    height,
    width,
    low_height,
    low_width,
    cell_rows,
    cell_columns,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    size = low_height * low_width
    blocks = tl.cdiv(size, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    y, x = tl.minimum(p, size - 1) // low_width, tl.minimum(p, size - 1) % low_width
    # The pixels that lean on a cell lie in the intervals on both of its sides, and these in a few tiles.
    top = first_in_interval(y - 1, low_height, height) // ROWS
    left = first_in_interval(x - 1, low_width, width) // COLUMNS
    bottom = tl.maximum(first_in_interval(y + 1, low_height, height) - 1, 0) // ROWS
    right = tl.maximum(first_in_interval(x + 1, low_width, width) - 1, 0) // COLUMNS
    across = tl.cdiv(width, COLUMNS)
    tiles, cells = across * tl.cdiv(height, ROWS), cell_rows * cell_columns
    tap, is_tap = _places()
    sums = tl.zeros((ROW, PIXELS), SUM)
    for i in range(tl.max(bottom - top, 0) + 1):
        cell_y = y - interval_of((top + i) * ROWS, low_height, height)
        there_y = (top + i <= bottom) & (cell_y >= 0) & (cell_y < cell_rows)
        for j in range(tl.max(right - left, 0) + 1):
            cell_x = x - interval_of((left + j) * COLUMNS, low_width, width)
            there = there_y & (left + j <= right) & (cell_x >= 0) & (cell_x < cell_columns)
            tile = image * tiles + (top + i) * across + left + j
            place = tile * TAPS * cells + cell_y * cell_columns + cell_x
            parts = products32 + place[None, :] + (tap * cells)[:, None]
            sums += tl.load(parts, mask=is_tap[:, None] & there[None, :], other=0.0).to(SUM)
    planes = _planes(merged, image, tap, size)
    tl.store(planes + p[None, :], sums.to(merged.dtype.element_ty), mask=is_tap[:, None] & (p < size)[None, :])


@triton.jit(do_not_specialize=["height", "width"])
def _cost_embedding_bwd_fold_kernel(
    products,  # [B K, 49, H W]
    grad,  # [B K, H, W]: of the costs
    height,
    width,
    SUM: tl.constexpr,
    PIXELS: tl.constexpr,
):
    size = height * width
    blocks = tl.cdiv(size, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    tap, is_tap = _places()
    dy, dx = tap // 7 - 3, tap % 7 - 3
    y, x = (p // width)[None, :] - dy[:, None], (p % width)[None, :] - dx[:, None]
    inside = is_tap[:, None] & (p < size)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    planes = _planes(products, image, tap, size)
    total = tl.sum(tl.load(planes + (y * width + x), mask=inside, other=0.0).to(SUM), 0)
    tl.store(grad + image * size + p, total.to(grad.dtype.element_ty), mask=p < size)


@triton.jit(do_not_specialize=["programs", *_VARIABLE])
def _cost_embedding_bwd_weight_kernel(
    grad,  # [B K, H, W, C]
    cost16,  # [B K, H, W]
    cost32,  # [B K, h, w]
    sums,  # [splits, 2, C, 64]
    programs,  # B K tiles
    height,
    width,
    low_height,
    low_width,
    cell_rows,
    cell_columns,
    channels,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (c < channels)[:, None]
    sum16 = tl.zeros((CHANNELS, ROW), SUM)
    sum32 = tl.zeros((CHANNELS, ROW), SUM)
    sizes = height, width, low_height, low_width, cell_rows, cell_columns
    for program in tl.range(tl.program_id(0), programs, tl.num_programs(0), num_stages=1):
        image, y, x, top, left = _tile(program, height, width, low_height, low_width, ROWS, COLUMNS)
        low = cost32 + image * low_height * low_width
        coarse = _upsampled_windows(low, y, x, top, left, *sizes, SUM, PRECISION, ROWS, COLUMNS)
        inside = ((y < height) & (x < width))[None, :]
        rows = grad + ((image * height + y) * width + x) * channels
        tile = tl.load(rows[None, :] + c[:, None], mask=there & inside, other=0.0)  # [CHANNELS, pixels]
        fine = _windows(cost16 + image * height * width, y, x, height, width)
        sum16 = tl.dot(tile, fine, sum16, input_precision=PRECISION, out_dtype=SUM)
        sum32 = tl.dot(tile, coarse, sum32, input_precision=PRECISION, out_dtype=SUM)
    rows = tl.program_id(0).to(tl.int64) * 2 * channels + c[:, None]
    places = sums + rows * ROW + tl.arange(0, ROW)[None, :]
    tl.store(places, sum16, mask=there)
    tl.store(places + channels * ROW, sum32, mask=there)


@triton.jit(do_not_specialize=["splits"])
def _cost_embedding_bwd_sum_kernel(
    sums,  # [splits, 2, C, 64]
    grad16,  # [C, 49], or None
    grad32,  # [C, 49], or None
    grad_bias,  # [C], or None
    splits,
    channels,
    SPLITS: tl.constexpr,
):
    c, scale = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, ROW)
    total = tl.zeros((SPLITS, ROW), sums.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        row = (split * 2 + scale).to(tl.int64) * channels + c
        total += tl.load(sums + row * ROW + place[None, :], mask=split < splits, other=0.0)
    total = tl.sum(total, 0)
    tap, is_tap = _places()
    if grad16 is not None:
        tl.store(grad16 + c * TAPS + tap, total, mask=is_tap & (scale == 0))
    if grad32 is not None:
        tl.store(grad32 + c * TAPS + tap, total, mask=is_tap & (scale == 1))
    if grad_bias is not None:
        tl.store(grad_bias + c, tl.sum(tl.where(place == ROW - 1, total, 0.0), 0), mask=scale == 0)


PROGRAMS = 264  # of the weights' gradients: two on each of 132 multiprocessors
TILES_PER_PROGRAM = 4  # at least, so that their sums are written and read less often than the maps
_TYPICAL = (40, 40, 20, 20)  # H, W, h, w


class _Shape(NamedTuple):
    """How the kernels with products are launched for one dtype."""

    precision: str
    tile: tuple[int, int]  # rows, columns
    fwd: tuple[int, int]  # channels at a time, warps
    bwd_cost: tuple[int, int]
    bwd_weight: tuple[int, int]


_SHAPES = {
    torch.float32: _Shape("tf32x3", (4, 8), (64, 8), (32, 4), (64, 8)),
    torch.bfloat16: _Shape("ieee", (8, 8), (64, 4), (64, 4), (128, 8)),
    torch.float16: _Shape("ieee", (8, 8), (64, 4), (64, 4), (128, 8)),
    torch.float64: _Shape("ieee", (8, 8), (32, 8), (32, 8), (16, 8)),
}


def _configs(dtype: torch.dtype, shape: _Shape) -> dict[str, Config]:
    total = torch.promote_types(dtype, torch.float32)
    rows, columns = shape.tile
    sum_dtype = {"SUM": LANGUAGE_DTYPE[total]}
    tile = {**sum_dtype, "ROWS": rows, "COLUMNS": columns}
    sizes = (*_TYPICAL, rows // 2 + 2, columns // 2 + 2)

    def product(kernel: Any, channels_and_warps: tuple[int, int], *arguments: torch.dtype | int) -> Config:
        channels, warps = channels_and_warps
        constants = {**tile, "PRECISION": shape.precision, "CHANNELS": channels}
        return Config(
            kernel, (*arguments, *sizes, 128), constants, warps, max_registers=255 if dtype.itemsize >= 4 else None
        )

    four = (dtype,) * 4
    fold, fold_sizes = {**sum_dtype, "PIXELS": 32}, _TYPICAL[:2]
    configs = {
        "pack": Config(_cost_embedding_pack_kernel, (*four, 128), {"CHANNELS": 16}, num_warps=4),
        "fwd": product(_cost_embedding_fwd_kernel, shape.fwd, *four),
        "bwd cost": product(_cost_embedding_bwd_cost_kernel, shape.bwd_cost, *four),
        "bwd merge": Config(
            _cost_embedding_bwd_merge_kernel, (dtype, total, *sizes), {**tile, "PIXELS": 16}, num_warps=4
        ),
        "bwd fold": Config(_cost_embedding_bwd_fold_kernel, (dtype, dtype, *fold_sizes), fold, num_warps=4),
        "bwd fold merged": Config(_cost_embedding_bwd_fold_kernel, (total, dtype, *fold_sizes), fold, num_warps=4),
        "bwd weight": product(_cost_embedding_bwd_weight_kernel, shape.bwd_weight, dtype, dtype, dtype, total, 3200),
        "bwd sum": Config(
            _cost_embedding_bwd_sum_kernel, (total, dtype, dtype, dtype, PROGRAMS, 128), {"SPLITS": 64}, num_warps=4
        ),
    }
    return {f"{label} {dtype}": config for label, config in configs.items()}


CONFIGS = {label: config for dtype, shape in _SHAPES.items() for label, config in _configs(dtype, shape).items()}


class _Plan(NamedTuple):
    """What the launches of one call have in common."""

    dtype: torch.dtype
    programs: int  # B K tiles
    channels: int
    sizes: tuple[int, ...]  # H, W, h, w
    cells: tuple[int, ...]  # rows and columns that a tile leans on

    def config(self, label: str) -> Config:
        return CONFIGS[f"{label} {self.dtype}"]


def _plan(cost16: Tensor, cost32: Tensor, bias: Tensor) -> _Plan:
    high, low, tile = cost16.shape[2:], cost32.shape[2:], _SHAPES[cost16.dtype].tile
    tiles = triton.cdiv(high[0], tile[0]) * triton.cdiv(high[1], tile[1])
    # The outermost of n pixels are (n - 1) h / H cells apart, and both lean on the next cell as well.
    cells = [triton.cdiv((min(n, H) - 1) * h, H) + 2 for n, h, H in zip(tile, low, high, strict=True)]
    programs = cost16.shape[0] * cost16.shape[1] * tiles
    return _Plan(cost16.dtype, programs, bias.shape[0], (*high, *low), tuple(cells))


def _packed(plan: _Plan, weight16: Tensor, weight32: Tensor, bias: Tensor) -> Tensor:
    """Both weights and the bias as [2, C, 64]."""
    weights = bias.new_empty((2, plan.channels, ROW.value))
    pack = plan.config("pack")
    grid = (triton.cdiv(plan.channels, pack.constants["CHANNELS"]),)
    pack.launch(grid, weight16.contiguous(), weight32.contiguous(), bias.contiguous(), weights, plan.channels)
    return weights


def forward(cost16: Tensor, cost32: Tensor, weight16: Tensor, weight32: Tensor, bias: Tensor) -> Tensor:
    """[B, K, H, W], [B, K, h, w] -> [B, K, H, W, C]; see :func:`errseg.ops.cost_embedding`."""
    out = cost16.new_empty((*cost16.shape, bias.shape[0]))
    if out.numel():
        plan = _plan(cost16, cost32, bias)
        arguments = cost16.contiguous(), cost32.contiguous(), _packed(plan, weight16, weight32, bias), out
        plan.config("fwd").launch((plan.programs,), *arguments, *plan.sizes, *plan.cells, plan.channels)
    return out


def backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the five arguments; those of the costs share launches, and so do those of the parameters."""
    *tensors, needed = arguments
    cost16, cost32, *parameters = tensors
    grads = [t.new_empty(t.shape if n else 0) for t, n in zip(tensors, needed, strict=True)]
    if not grad.numel():
        return [g.zero_() for g in grads]
    plan, grad = _plan(cost16, cost32, parameters[2]), grad.contiguous()
    if any(needed[2:]):
        _parameter_grads(plan, grad, cost16.contiguous(), cost32.contiguous(), grads[2:])
    if any(needed[:2]):
        _cost_grads(plan, grad, _packed(plan, *parameters), *grads[:2])
    return grads


def _parameter_grads(plan: _Plan, grad: Tensor, cost16: Tensor, cost32: Tensor, grads: Sequence[Tensor]) -> None:
    """Fill those of the three gradients that are not empty."""
    splits = min(PROGRAMS, triton.cdiv(plan.programs, TILES_PER_PROGRAM))
    sums = grad.new_empty((splits, 2, plan.channels, ROW.value), dtype=torch.promote_types(plan.dtype, torch.float32))
    config = plan.config("bwd weight")
    grid = splits, triton.cdiv(plan.channels, config.constants["CHANNELS"])
    config.launch(grid, grad, cost16, cost32, sums, plan.programs, *plan.sizes, *plan.cells, plan.channels)
    wanted = [g if g.numel() else None for g in grads]
    plan.config("bwd sum").launch((plan.channels, 2), sums, *wanted, splits, plan.channels)


def _cost_grads(plan: _Plan, grad: Tensor, weights: Tensor, grad16: Tensor, grad32: Tensor) -> None:
    """Fill those of the two gradients that are not empty."""
    height, width, low_height, low_width = plan.sizes
    maps = grad.shape[0] * grad.shape[1]
    products16 = grad.new_empty((maps, TAPS.value, height * width))
    products32 = grad.new_empty((plan.programs, TAPS.value, plan.cells[0] * plan.cells[1]))
    arguments = grad, weights, products16, products32, *plan.sizes, *plan.cells, plan.channels
    plan.config("bwd cost").launch((plan.programs,), *arguments)
    if grad16.numel():
        _fold(plan.config("bwd fold"), products16, grad16)
    if grad32.numel():
        merge, size = plan.config("bwd merge"), low_height * low_width
        sums = grad.new_empty((maps, TAPS.value, size), dtype=torch.promote_types(plan.dtype, torch.float32))
        blocks = triton.cdiv(size, merge.constants["PIXELS"])
        merge.launch((maps * blocks,), products32, sums, *plan.sizes, *plan.cells)
        _fold(plan.config("bwd fold merged"), sums, grad32)


def _fold(config: Config, products: Tensor, grad: Tensor) -> None:
    """Add up [B K, 49, H W] along the windows."""
    height, width = grad.shape[2:]
    blocks = triton.cdiv(height * width, config.constants["PIXELS"])
    config.launch((products.shape[0] * blocks,), products, grad, height, width)
