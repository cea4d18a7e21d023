"""Backward kernels of the spatial attention: scores and their gradients are made anew, tile by tile.

What they hand to each other and to the products of the weights' gradients lies in the order of the windows, [.., T, C],
with zeros for the pixels that an odd map lacks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from errseg.kernels._spatial_attention_fwd import normalized_product, pixel_of
from errseg.kernels.common import normalized, product


@triton.jit(do_not_specialize=["num_classes", "height", "width"])
def _spatial_attention_queries_bwd_kernel(
    grad,  # [B, K, H, W, C]: of the projected mixture
    x,  # [B, K, H, W, C]
    query_map,  # [B, H, W, C]
    key,  # [B, K, N_kv, C]
    value,  # [B, K, N_kv, C]
    query_weight,  # [C, C]
    out_weight,  # [C, C]
    mixture,  # [B, K, H, W, C]
    log_sums,  # [B, K, heads, T]
    z,  # [B, K, T, C]: normalised pixels
    query,  # [B, K, T, C]: times SCALE
    mixture_grad,  # [B, K, T, C]
    query_grad,  # [B, K, T, C]
    deltas,  # [B, K, heads, T]: products of the mixture and its gradient
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
    c, b, d, n = tl.arange(0, CHANNELS), tl.arange(0, BLOCK), tl.arange(0, HEAD), tl.arange(0, KEYS)
    grad += label * height * width * C
    x += label * height * width * C
    mixture += label * height * width * C
    query_map += label // num_classes * height * width * C
    key += label * num_keys * C
    value += label * num_keys * C
    z += label * num_tokens * C
    query += label * num_tokens * C
    mixture_grad += label * num_tokens * C
    query_grad += label * num_tokens * C
    log_sums += label * HEADS * num_tokens
    deltas += label * HEADS * num_tokens
    dtype = x.dtype.element_ty

    channel_there = there[:, None] & (c < C)[None, :]
    tile = tl.load(x + pixel[:, None] * C + c[None, :], mask=channel_there, other=0.0)
    z_tile, _, _ = normalized(tile.to(DTYPE), C, EPS)
    z_tile = z_tile.to(dtype)
    tl.store(z + t[:, None] * C + c[None, :], z_tile, mask=(t < num_tokens)[:, None] & (c < C)[None, :])

    for head in range(HEADS):
        hd = head * (C // HEADS) + d
        real = d < C // HEADS
        head_there = there[:, None] & real[None, :]
        q = tl.load(query_map + pixel[:, None] * C + hd[None, :], mask=head_there, other=0.0).to(DTYPE)
        do = tl.zeros((QUERIES, HEAD), DTYPE)
        if BLOCK == CHANNELS:
            known = (c < C)[:, None] & real[None, :]
            weight = tl.load(query_weight + hd[None, :] * C + c[:, None], mask=known, other=0.0)
            q = product(z_tile, weight, q, PRECISION)
        else:
            q = normalized_product(
                x + pixel * C, there, query_weight + hd * C, real, q, C, EPS, CHANNELS, BLOCK, PRECISION
            )
        q = (q * SCALE).to(dtype)  # [QUERIES, HEAD]
        for start in range(0, C, BLOCK):
            left = b < C - start
            part = tl.load(
                grad + pixel[:, None] * C + start + b[None, :], mask=there[:, None] & left[None, :], other=0.0
            )
            known = left[:, None] & real[None, :]
            weight = tl.load(out_weight + (start + b)[:, None] * C + hd[None, :], mask=known, other=0.0)
            do = product(part, weight, do, PRECISION)
        o = tl.load(mixture + pixel[:, None] * C + hd[None, :], mask=head_there, other=0.0).to(DTYPE)
        do = do.to(dtype)  # [QUERIES, HEAD]
        delta = tl.sum(o * do.to(DTYPE), 1)
        log_sum = tl.load(log_sums + head * num_tokens + t, mask=t < num_tokens, other=0.0)
        dq = tl.zeros((QUERIES, HEAD), DTYPE)
        for start in range(0, num_keys, KEYS):
            left = n < num_keys - start
            rows = (start + n) * C
            transposed = left[None, :] & real[:, None]
            k = tl.load(key + rows[None, :] + hd[:, None], mask=transposed, other=0.0)  # [HEAD, KEYS]
            v = tl.load(value + rows[None, :] + hd[:, None], mask=transposed, other=0.0)
            scores = product(q, k, tl.zeros((QUERIES, KEYS), DTYPE), PRECISION)
            shares = tl.exp2(tl.where(left[None, :], scores - log_sum[:, None], float("-inf")))
            ds = product(do, v, tl.zeros((QUERIES, KEYS), DTYPE), PRECISION)
            ds = (shares * (ds - delta[:, None])).to(dtype)
            dq = product(ds, tl.trans(k), dq, PRECISION)
        place = t[:, None] * C + hd[None, :]
        stored = (t < num_tokens)[:, None] & real[None, :]
        tl.store(query + place, q, mask=stored)
        tl.store(mixture_grad + place, do, mask=stored)
        tl.store(query_grad + place, tl.where(there[:, None], dq / (C / HEADS) ** 0.5, 0.0), mask=stored)
        tl.store(deltas + head * num_tokens + t, delta, mask=t < num_tokens)


@triton.jit(do_not_specialize=["num_keys", "num_tokens"])
def _spatial_attention_keys_bwd_kernel(
    query,  # [B, K, T, C]: times log2(e) over the square root of the head width
    mixture_grad,  # [B, K, T, C]
    key,  # [B, K, N_kv, C]
    value,  # [B, K, N_kv, C]
    log_sums,  # [B, K, heads, T]
    deltas,  # [B, K, heads, T]
    key_grad,  # [B, K, N_kv, C]
    value_grad,  # [B, K, N_kv, C]
    num_keys,
    num_tokens,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    tiles = tl.cdiv(num_keys, KEYS)
    head = tl.program_id(1)
    label = (tl.program_id(0) // tiles).to(tl.int64)  # counts the classes of all images
    n = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    d, t = tl.arange(0, HEAD), tl.arange(0, QUERIES)
    hd = head * (C // HEADS) + d
    real = d < C // HEADS
    query += label * num_tokens * C
    mixture_grad += label * num_tokens * C
    log_sums += (label * HEADS + head) * num_tokens
    deltas += (label * HEADS + head) * num_tokens
    place = n[:, None] * C + hd[None, :] + label * num_keys * C
    inside = (n < num_keys)[:, None] & real[None, :]
    k = tl.load(key + place, mask=inside, other=0.0)
    v = tl.load(value + place, mask=inside, other=0.0)

    dk = tl.zeros((KEYS, HEAD), DTYPE)
    dv = tl.zeros((KEYS, HEAD), DTYPE)
    for start in range(0, num_tokens, QUERIES):
        # Past the last token queries and gradients read as zero, and add nothing.
        left = t < num_tokens - start
        rows = (start + t)[:, None] * C + hd[None, :]
        known = left[:, None] & real[None, :]
        q = tl.load(query + rows, mask=known, other=0.0)  # [QUERIES, HEAD]
        do = tl.load(mixture_grad + rows, mask=known, other=0.0)
        log_sum = tl.load(log_sums + start + t, mask=left, other=0.0)
        delta = tl.load(deltas + start + t, mask=left, other=0.0)
        scores = product(k, tl.trans(q), tl.zeros((KEYS, QUERIES), DTYPE), PRECISION)
        shares = tl.exp2(scores - log_sum[None, :])
        dv = product(shares.to(v.dtype), do, dv, PRECISION)
        ds = product(v, tl.trans(do), tl.zeros((KEYS, QUERIES), DTYPE), PRECISION)
        ds = shares * (ds - delta[None, :])
        dk = product(ds.to(k.dtype), q, dk, PRECISION)
    tl.store(key_grad + place, dk * LN2, mask=inside)
    tl.store(value_grad + place, dv, mask=inside)


@triton.jit(do_not_specialize=["num_classes", "num_keys", "rows"])
def _spatial_attention_norm_bwd_kernel(
    reduced,  # [B, K, N_kv, OUT]: without what is added; becomes the normalised rows
    gradient,  # [B, K, N_kv, OUT]: of the normalised rows; becomes that of the reduced ones
    added,  # [B, N_kv, OUT], or [OUT] where PER_KEY is false
    rows,  # B K N_kv
    num_classes,
    num_keys,
    OUT: tl.constexpr,
    PER_KEY: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    place = row[:, None] * OUT + column[None, :]
    if PER_KEY:
        shared = row // (num_classes * num_keys) * num_keys + row % num_keys
        bias = tl.load(added + shared[:, None] * OUT + column[None, :], mask=inside, other=0.0)
    else:
        bias = tl.load(added + column, mask=column < OUT, other=0.0)[None, :]
    y = tl.load(reduced + place, mask=inside, other=0.0).to(DTYPE) + bias.to(DTYPE)
    du = tl.load(gradient + place, mask=inside, other=0.0).to(DTYPE)
    inverse = 1.0 / tl.sqrt(tl.sum(y * y, 1) / OUT + EPS)[:, None]
    u = y * inverse
    dy = inverse * (du - u * (tl.sum(du * u, 1) / OUT)[:, None])
    tl.store(reduced + place, u, mask=inside)
    tl.store(gradient + place, dy, mask=inside)


@triton.jit
def _add_product(
    accumulator,  # [WINDOWS, CHANNELS]
    rows,  # [WINDOWS]: pointers to rows of OUT
    inside,  # [WINDOWS]
    weight,  # [OUT, C], rows WEIGHT_STRIDE apart
    OUT: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c, inner = tl.arange(0, CHANNELS), tl.arange(0, INNER)
    for start in range(0, OUT, INNER):
        left = inner < OUT - start
        factor = tl.load(rows[:, None] + start + inner[None, :], mask=inside[:, None] & left[None, :], other=0.0)
        known = left[:, None] & (c < C)[None, :]
        w = tl.load(weight + (start + inner)[:, None] * WEIGHT_STRIDE + c[None, :], mask=known, other=0.0)
        accumulator = product(factor, w, accumulator, PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["height", "width"])
def _spatial_attention_bwd_kernel(
    grad,  # [B, K, H, W, C]
    x,  # [B, K, H, W, C]
    query_grad,  # [B, K, T, C]
    reduced_key_grad,  # [B, K, N_kv, 2C]
    reduced_value_grad,  # [B, K, N_kv, C]
    query_weight,  # [C, C]
    key_reduce_weight,  # [2C, r r C]
    value_reduce_weight,  # [C, r r C]
    x_grad,  # [B, K, H, W, C]
    height,
    width,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WINDOWS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The programs of one tile share their gradients, which they find in the L2 cache.
    position = tl.program_id(0) % (STRIDE * STRIDE)  # in a window
    program = tl.program_id(0) // (STRIDE * STRIDE)
    across, down = tl.cdiv(width, STRIDE), tl.cdiv(height, STRIDE)
    num_keys = (height // STRIDE) * (width // STRIDE)
    tiles = tl.cdiv(down * across, WINDOWS)
    label = (program // tiles).to(tl.int64)  # counts the classes of all images
    window = program % tiles * WINDOWS + tl.arange(0, WINDOWS)
    t = window * (STRIDE * STRIDE) + position
    pixel, there = pixel_of(t, height, width, STRIDE)
    row, column = window // across, window % across
    n = tl.where(column < width // STRIDE, row * (width // STRIDE) + column, num_keys)
    whole = n < num_keys
    query_grad += label * down * across * (STRIDE * STRIDE * C)
    reduced_key_grad += label * num_keys * (2 * C)
    reduced_value_grad += label * num_keys * C

    dz = tl.zeros((WINDOWS, CHANNELS), DTYPE)
    dz = _add_product(dz, query_grad + t * C, there, query_weight, C, C, C, CHANNELS, INNER, PRECISION)
    weight = key_reduce_weight + position * C
    rows = reduced_key_grad + n * (2 * C)
    dz = _add_product(dz, rows, whole, weight, 2 * C, STRIDE * STRIDE * C, C, CHANNELS, INNER, PRECISION)
    weight = value_reduce_weight + position * C
    rows = reduced_value_grad + n * C
    dz = _add_product(dz, rows, whole, weight, C, STRIDE * STRIDE * C, C, CHANNELS, INNER, PRECISION)

    c = tl.arange(0, CHANNELS)
    inside = there[:, None] & (c < C)[None, :]
    place = pixel[:, None] * C + c[None, :] + label * height * width * C
    z, _, inverse = normalized(tl.load(x + place, mask=inside, other=0.0).to(DTYPE), C, EPS)
    dz -= (tl.sum(dz, 1) / C)[:, None] + z * (tl.sum(dz * z, 1) / C)[:, None]
    dx = tl.load(grad + place, mask=inside, other=0.0).to(DTYPE) + dz * inverse[:, None]
    tl.store(x_grad + place, dx, mask=inside)
