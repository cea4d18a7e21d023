"""Forward kernels of the spatial attention, and what the backward ones share with them.

Queries are taken window by window: token t of a map is pixel t % r r of window t // r r, with windows counted over the
whole map. An odd map ends in windows that stick out; their missing pixels read as zero. Keys belong to whole windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from errseg.kernels.common import normalized, product


@triton.jit
def pixel_of(t, height, width, STRIDE: tl.constexpr):
    """Where token ``t`` lies in a map, and whether it does."""
    across = tl.cdiv(width, STRIDE)
    window = t // (STRIDE * STRIDE)
    row = window // across * STRIDE + t % (STRIDE * STRIDE) // STRIDE
    column = window % across * STRIDE + t % STRIDE
    # Not `and`: LLVM would make a vector of the bits, for which it reserves stack.
    return row * width + column, tl.where(column < width, row, height) < height


@triton.jit
def normalized_product(
    rows,  # [M]: pointers to rows of C
    inside,  # [M]
    weight,  # [N]: pointers to rows of C
    known,  # [N]
    accumulator,  # [M, N]
    C: tl.constexpr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the normalised rows times the transposed weight, BLOCK channels at a time."""
    c, b = tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    tile = tl.load(rows[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
    z, mean, inverse = normalized(tile.to(accumulator.dtype), C, EPS)
    if BLOCK == CHANNELS:
        factor = tl.load(weight[None, :] + c[:, None], mask=(c < C)[:, None] & known[None, :], other=0.0)
        accumulator = product(z.to(tile.dtype), factor, accumulator, PRECISION)
    else:
        for start in range(0, C, BLOCK):
            left = b < C - start
            part = tl.load(rows[:, None] + start + b[None, :], mask=inside[:, None] & left[None, :], other=0.0)
            z_part = (part.to(accumulator.dtype) - mean[:, None]) * inverse[:, None]
            part_factor = tl.load(weight[None, :] + start + b[:, None], mask=left[:, None] & known[None, :], other=0.0)
            accumulator = product(z_part.to(part.dtype), part_factor, accumulator, PRECISION)
    return accumulator


@triton.jit
def _projected_windows(
    x,  # [H, W, C] of one map
    corner,  # [KEYS]: first pixel of each window
    inside,  # [KEYS]
    width,
    reduce_weight,  # [OUT, r r C]
    bias,  # [KEYS, COLUMNS]: pointers to the first columns of what is added to the reduced windows
    project_weight,  # [C, OUT]
    OUT: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[KEYS, CHANNELS]: windows of normalised pixels, reduced to OUT columns, over their root mean square, projected.

    A block of reduced columns at a time goes on to the projection, so that the reduced windows never exist as a whole.
    """
    c, column = tl.arange(0, CHANNELS), tl.arange(0, COLUMNS)
    squares = tl.zeros((KEYS,), DTYPE)
    projected = tl.zeros((KEYS, CHANNELS), DTYPE)
    for start in range(0, OUT, COLUMNS):
        known = column < OUT - start
        reduced = tl.load(bias + start, mask=inside[:, None] & known[None, :], other=0.0).to(DTYPE)  # [KEYS, COLUMNS]
        for position in range(STRIDE * STRIDE):
            pixel = corner + position // STRIDE * width + position % STRIDE
            weight = reduce_weight + (start + column) * (STRIDE * STRIDE * C) + position * C
            reduced = normalized_product(
                x + pixel * C, inside, weight, known, reduced, C, EPS, CHANNELS, BLOCK, PRECISION
            )
        squares += tl.sum(reduced * reduced, 1)
        there = known[:, None] & (c < C)[None, :]
        weight = tl.load(project_weight + start + c[None, :] * OUT + column[:, None], mask=there, other=0.0)
        projected = product(reduced.to(weight.dtype), weight, projected, PRECISION)
    return projected / tl.sqrt(squares / OUT + EPS)[:, None]


@triton.jit(do_not_specialize=["num_classes", "height", "width"])
def _spatial_attention_keys_fwd_kernel(
    x,  # [B, K, H, W, C]
    key_map,  # [B, N_kv, 2C]
    key_reduce_weight,  # [2C, r r C]
    key_weight,  # [C, 2C]
    value_reduce_weight,  # [C, r r C]
    value_reduce_bias,  # [C]
    value_weight,  # [C, C]
    value_bias,  # [C]
    key,  # [B, K, N_kv, C]
    value,  # [B, K, N_kv, C]
    num_classes,
    height,
    width,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = width // STRIDE
    num_keys = height // STRIDE * across
    tiles = tl.cdiv(num_keys, KEYS)
    label = (tl.program_id(0) // tiles).to(tl.int64)  # counts the classes of all images
    n = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    inside = n < num_keys
    corner = n // across * STRIDE * width + n % across * STRIDE
    c, column = tl.arange(0, CHANNELS), tl.arange(0, COLUMNS)
    x += label * height * width * C
    key += label * num_keys * C
    value += label * num_keys * C
    key_map += label // num_classes * num_keys * 2 * C
    out = n[:, None] * C + c[None, :]
    there = inside[:, None] & (c < C)[None, :]

    bias = key_map + n[:, None] * (2 * C) + column[None, :]
    projected = _projected_windows(
        *(x, corner, inside, width, key_reduce_weight, bias, key_weight, 2 * C),
        *(C, STRIDE, EPS, CHANNELS, BLOCK, COLUMNS, KEYS, DTYPE, PRECISION),
    )
    tl.store(key + out, projected, mask=there)
    bias = value_reduce_bias + n[:, None] * 0 + column[None, :]
    projected = _projected_windows(
        *(x, corner, inside, width, value_reduce_weight, bias, value_weight, C),
        *(C, STRIDE, EPS, CHANNELS, BLOCK, COLUMNS, KEYS, DTYPE, PRECISION),
    )
    projected += tl.load(value_bias + c, mask=c < C, other=0.0)[None, :]
    tl.store(value + out, projected, mask=there)


@triton.jit(do_not_specialize=["num_classes", "height", "width"])
def _spatial_attention_fwd_kernel(
    x,  # [B, K, H, W, C]
    query_map,  # [B, H, W, C]
    key,  # [B, K, N_kv, C]
    value,  # [B, K, N_kv, C]
    query_weight,  # [C, C]
    out_weight,  # [C, C]
    out_bias,  # [C]
    drop_path,  # [B, K] or None
    out,  # [B, K, H, W, C]
    mixture,  # [B, K, H, W, C] or None: what the heads make of the values
    log_sums,  # [B, K, heads, T] or None, base 2
    num_classes,
    height,
    width,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) over the square root of the head width
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_keys = (height // STRIDE) * (width // STRIDE)
    num_tokens = tl.cdiv(height, STRIDE) * tl.cdiv(width, STRIDE) * STRIDE * STRIDE
    tiles = tl.cdiv(num_tokens, QUERIES)
    label = (tl.program_id(0) // tiles).to(tl.int64)  # counts the classes of all images
    t = tl.program_id(0) % tiles * QUERIES + tl.arange(0, QUERIES)
    pixel, there = pixel_of(t, height, width, STRIDE)
    c, d, n = tl.arange(0, CHANNELS), tl.arange(0, HEAD), tl.arange(0, KEYS)
    tile = pixel[:, None] * C + c[None, :]  # [QUERIES, CHANNELS]
    inside = there[:, None] & (c < C)[None, :]
    # Offsets within a map fit into 32 bits, and into half the registers.
    x += label * height * width * C
    out += label * height * width * C
    query_map += label // num_classes * height * width * C
    key += label * num_keys * C
    value += label * num_keys * C
    if mixture is not None:
        mixture += label * height * width * C
        log_sums += label * HEADS * num_tokens
    dtype = x.dtype.element_ty
    if BLOCK == CHANNELS:
        z, _, _ = normalized(tl.load(x + tile, mask=inside, other=0.0).to(DTYPE), C, EPS)
        z = z.to(dtype)  # [QUERIES, CHANNELS]

    result = tl.zeros((QUERIES, CHANNELS), DTYPE)
    for head in range(HEADS):
        hd = head * (C // HEADS) + d
        real = d < C // HEADS
        known = (c < C)[:, None] & real[None, :]
        query = tl.load(
            query_map + pixel[:, None] * C + hd[None, :], mask=there[:, None] & real[None, :], other=0.0
        ).to(DTYPE)
        weight = query_weight + hd * C
        if BLOCK == CHANNELS:
            factor = tl.load(weight[None, :] + c[:, None], mask=known, other=0.0)  # [CHANNELS, HEAD]
            query = product(z, factor, query, PRECISION)
        else:
            query = normalized_product(x + pixel * C, there, weight, real, query, C, EPS, CHANNELS, BLOCK, PRECISION)
        query = (query * SCALE).to(dtype)  # [QUERIES, HEAD]
        highest = tl.full((QUERIES,), float("-inf"), DTYPE)
        total = tl.zeros((QUERIES,), DTYPE)
        mixed = tl.zeros((QUERIES, HEAD), DTYPE)
        for start in range(0, num_keys, KEYS):
            left = n < num_keys - start
            rows = (start + n) * C
            k = tl.load(key + rows[None, :] + hd[:, None], mask=left[None, :] & real[:, None], other=0.0)
            scores = product(query, k, tl.zeros((QUERIES, KEYS), DTYPE), PRECISION)
            scores = tl.where(left[None, :], scores, float("-inf"))
            before, highest = highest, tl.maximum(highest, tl.max(scores, 1))
            scores = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(before - highest)
            total = total * shrink + tl.sum(scores, 1)
            v = tl.load(value + rows[:, None] + hd[None, :], mask=left[:, None] & real[None, :], other=0.0)
            mixed = product(scores.to(v.dtype), v, mixed * shrink[:, None], PRECISION)
        mixed = (mixed / total[:, None]).to(dtype)
        if mixture is not None:
            tl.store(mixture + pixel[:, None] * C + hd[None, :], mixed, mask=there[:, None] & real[None, :])
            tl.store(log_sums + head * num_tokens + t, highest + tl.log2(total), mask=t < num_tokens)
        weight = tl.load(out_weight + c[None, :] * C + hd[:, None], mask=tl.trans(known), other=0.0)  # [HEAD, CHANNELS]
        result = product(mixed, weight, result, PRECISION)

    result += tl.load(out_bias + c, mask=c < C, other=0.0).to(DTYPE)[None, :]
    if drop_path is not None:
        result *= tl.load(drop_path + label).to(DTYPE)
    # Read again: the pixels need no registers meanwhile.
    result += tl.load(x + tile, mask=inside, other=0.0).to(DTYPE)
    tl.store(out + tile, result, mask=inside)
