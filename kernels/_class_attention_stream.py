"""Kernels for any number of classes: attention with a running softmax over tiles of them, forward and backward.

They see the products with the weights as rows [N, K, 3, C] of query, key and value; a program owns a tile of classes of
one pixel and one head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from errseg.kernels.common import product


@triton.jit
def _owned(num_classes, C: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr):
    """A program's pixel and classes, the channels of its head, and which of both there are."""
    tiles = tl.cdiv(num_classes, TILE)
    pixel = (tl.program_id(0) // tiles).to(tl.int64)
    label = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    d = tl.arange(0, HEAD)
    return pixel, label, tl.program_id(1) * (C // HEADS) + d, label < num_classes, d < C // HEADS


@triton.jit(do_not_specialize=["num_classes"])
def _class_attention_stream_fwd_kernel(
    heads,  # [N, K, 3, C]: query, key and value
    mixture,  # [N, K, C]
    log_sums,  # [N, heads, K], base 2
    num_classes,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) over the square root of the head width
    HEAD: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pixel, label, hd, there, real = _owned(num_classes, C, HEADS, HEAD, TILE)
    n = tl.arange(0, TILE)
    heads += pixel * num_classes * 3 * C
    inside = there[:, None] & real[None, :]
    query = tl.load(heads + label[:, None] * (3 * C) + hd[None, :], mask=inside, other=0.0)
    highest = tl.full((TILE,), float("-inf"), DTYPE)
    total = tl.zeros((TILE,), DTYPE)
    mixed = tl.zeros((TILE, HEAD), DTYPE)
    for start in range(0, num_classes, TILE):
        left = n < num_classes - start
        rows = heads + (start + n) * (3 * C)
        key = tl.load(rows[None, :] + C + hd[:, None], mask=left[None, :] & real[:, None], other=0.0)  # [HEAD, TILE]
        scores = product(query, key, tl.zeros((TILE, TILE), DTYPE), PRECISION) * SCALE
        scores = tl.where(left[None, :], scores, float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(scores, 1))
        scores = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(before - highest)
        total = total * shrink + tl.sum(scores, 1)
        value = tl.load(rows[:, None] + 2 * C + hd[None, :], mask=left[:, None] & real[None, :], other=0.0)
        mixed = product(scores.to(value.dtype), value, mixed * shrink[:, None], PRECISION)
    mixed = (mixed / total[:, None]).to(mixture.dtype.element_ty)
    tl.store(mixture + (pixel * num_classes + label)[:, None] * C + hd[None, :], mixed, mask=inside)
    sums = log_sums + (pixel * HEADS + tl.program_id(1)) * num_classes
    tl.store(sums + label, highest + tl.log2(total), mask=there)


@triton.jit(do_not_specialize=["num_classes"])
def _class_attention_stream_queries_bwd_kernel(
    heads,  # [N, K, 3, C]
    mixture,  # [N, K, C]
    mixture_grad,  # [N, K, C]
    log_sums,  # [N, heads, K]
    deltas,  # [N, heads, K]: products of the mixture and its gradient
    gradients,  # [N, K, 3, C]: this kernel writes those of the queries
    num_classes,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pixel, label, hd, there, real = _owned(num_classes, C, HEADS, HEAD, TILE)
    n = tl.arange(0, TILE)
    heads += pixel * num_classes * 3 * C
    inside = there[:, None] & real[None, :]
    place = (pixel * num_classes + label)[:, None] * C + hd[None, :]
    query = tl.load(heads + label[:, None] * (3 * C) + hd[None, :], mask=inside, other=0.0)
    do = tl.load(mixture_grad + place, mask=inside, other=0.0)
    mixed = tl.load(mixture + place, mask=inside, other=0.0)
    of_head = (pixel * HEADS + tl.program_id(1)) * num_classes + label
    log_sum = tl.load(log_sums + of_head, mask=there, other=0.0)
    delta = tl.sum(mixed.to(DTYPE) * do.to(DTYPE), 1)
    tl.store(deltas + of_head, delta, mask=there)
    dq = tl.zeros((TILE, HEAD), DTYPE)
    for start in range(0, num_classes, TILE):
        left = n < num_classes - start
        rows = heads + (start + n) * (3 * C)
        known = left[None, :] & real[:, None]
        key = tl.load(rows[None, :] + C + hd[:, None], mask=known, other=0.0)  # [HEAD, TILE]
        value = tl.load(rows[None, :] + 2 * C + hd[:, None], mask=known, other=0.0)
        scores = product(query, key, tl.zeros((TILE, TILE), DTYPE), PRECISION) * SCALE
        shares = tl.where(left[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        ds = product(do, value, tl.zeros((TILE, TILE), DTYPE), PRECISION)
        ds = (shares * (ds - delta[:, None])).to(key.dtype)
        dq = product(ds, tl.trans(key), dq, PRECISION)
    dq = (dq / (C / HEADS) ** 0.5).to(gradients.dtype.element_ty)
    tl.store(gradients + (pixel * num_classes + label)[:, None] * (3 * C) + hd[None, :], dq, mask=inside)


@triton.jit(do_not_specialize=["num_classes"])
def _class_attention_stream_keys_bwd_kernel(
    heads,  # [N, K, 3, C]
    mixture_grad,  # [N, K, C]
    log_sums,  # [N, heads, K]
    deltas,  # [N, heads, K]
    gradients,  # [N, K, 3, C]: this kernel writes those of keys and values
    num_classes,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pixel, label, hd, there, real = _owned(num_classes, C, HEADS, HEAD, TILE)
    n = tl.arange(0, TILE)
    heads += pixel * num_classes * 3 * C
    mixture_grad += pixel * num_classes * C
    log_sums += (pixel * HEADS + tl.program_id(1)) * num_classes
    deltas += (pixel * HEADS + tl.program_id(1)) * num_classes
    inside = there[:, None] & real[None, :]
    key = tl.load(heads + label[:, None] * (3 * C) + C + hd[None, :], mask=inside, other=0.0)
    value = tl.load(heads + label[:, None] * (3 * C) + 2 * C + hd[None, :], mask=inside, other=0.0)
    dk = tl.zeros((TILE, HEAD), DTYPE)
    dv = tl.zeros((TILE, HEAD), DTYPE)
    for start in range(0, num_classes, TILE):
        # Past the last class queries and gradients read as zero, and add nothing.
        left = n < num_classes - start
        known = left[:, None] & real[None, :]
        query = tl.load(heads + (start + n)[:, None] * (3 * C) + hd[None, :], mask=known, other=0.0)
        do = tl.load(mixture_grad + (start + n)[:, None] * C + hd[None, :], mask=known, other=0.0)
        log_sum = tl.load(log_sums + start + n, mask=left, other=0.0)
        delta = tl.load(deltas + start + n, mask=left, other=0.0)
        scores = product(key, tl.trans(query), tl.zeros((TILE, TILE), DTYPE), PRECISION) * SCALE
        shares = tl.exp2(scores - log_sum[None, :])
        dv = product(shares.to(do.dtype), do, dv, PRECISION)
        ds = product(value, tl.trans(do), tl.zeros((TILE, TILE), DTYPE), PRECISION)
        ds = (shares * (ds - delta[None, :])).to(query.dtype)
        dk = product(ds, query, dk, PRECISION)
    rows = gradients + (pixel * num_classes + label)[:, None] * (3 * C) + hd[None, :]
    dtype = gradients.dtype.element_ty
    tl.store(rows + C, (dk / (C / HEADS) ** 0.5).to(dtype), mask=inside)
    tl.store(rows + 2 * C, dv.to(dtype), mask=inside)
