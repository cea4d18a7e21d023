"""Kernels for as many classes as the rows of one tile.

A program owns some pixels with all of their classes, so that they share the weights that it streams: its row r is class
r % K of pixel r // K. One product gives the scores of all rows; those between different pixels are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from errseg.kernels.common import normalized, product, relu6


@triton.jit
def _rows(num_classes, first_pixel, num_pixels, ROWS: tl.constexpr, DTYPE: tl.constexpr = tl.int32):
    """A program's image and first row among those of the launch; pixel, class and presence of each of its rows.

    In another dtype they are made anew, and need no registers in between.
    """
    pixels = ROWS // num_classes
    tiles = tl.cdiv(num_pixels, pixels)
    image = (tl.program_id(0) // tiles).to(DTYPE).to(tl.int64)
    first = tl.program_id(0) % tiles * pixels
    r = tl.arange(0, ROWS).to(DTYPE)
    pixel, label = first_pixel + first.to(DTYPE) + r // num_classes.to(DTYPE), r % num_classes.to(DTYPE)
    there = r < tl.minimum(pixels, num_pixels - first) * num_classes
    return image, (image * num_pixels + first) * num_classes, pixel, label, there


@triton.jit
def _corner(pixel, width, in_width):
    """The first of the four pixels that a pooled one is the mean of."""
    width = width.to(pixel.dtype)
    return pixel // width * (2 * in_width) + pixel % width * 2


@triton.jit
def _place(rows, tile, inside):
    """Put a tile where the whole program can read it: a loaded factor needs no registers."""
    tl.debug_barrier()  # what stood there has been read
    tl.store(rows, tile.to(rows.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit
def _projected(
    tile,  # [ROWS, CHANNELS]: the rows, or None
    rows,  # [ROWS]: without a tile, pointers to them
    mean,  # [ROWS]: of rows that are yet to be normalised, or None
    inverse,  # [ROWS]: one over their deviations
    there,  # [ROWS]
    weight,  # [N]: pointers to rows of C
    known,  # [N]
    accumulator,  # [ROWS, N]
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    STRIDE: tl.constexpr = 1,  # of the weight's channels
):
    """Add the rows times the transposed weight; without a tile STEP channels at a time."""
    if tile is not None:
        c = tl.arange(0, CHANNELS)
        factor = tl.load(weight[None, :] + c[:, None] * STRIDE, mask=(c < C)[:, None] & known[None, :], other=0.0)
        accumulator = product(tile, factor, accumulator, PRECISION)
    else:
        c = tl.arange(0, STEP)
        for start in range(0, C, STEP):
            left = c < C - start
            part = tl.load(rows[:, None] + start + c[None, :], mask=there[:, None] & left[None, :], other=0.0)
            if mean is not None:
                part = ((part.to(accumulator.dtype) - mean[:, None]) * inverse[:, None]).to(part.dtype)
            columns = weight[None, :] + (start + c)[:, None] * STRIDE
            factor = tl.load(columns, mask=left[:, None] & known[None, :], other=0.0)
            accumulator = product(part, factor, accumulator, PRECISION)
    return accumulator


@triton.jit
def _head(
    z,  # [ROWS, CHANNELS], as in _projected
    rows,
    mean,
    inverse,
    there,
    added,  # [ROWS]: pointers to what is added to the products
    weight,  # [C, C]
    hd,  # [HEAD]: channels of the head
    real,  # [HEAD]
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Query, key or value of one head: [ROWS, HEAD]."""
    start = tl.load(added[:, None] + hd[None, :], mask=there[:, None] & real[None, :], other=0.0)
    head = start.to(DTYPE)
    head = _projected(z, rows, mean, inverse, there, weight + hd * C, real, head, C, CHANNELS, STEP, PRECISION)
    return head.to(start.dtype)


@triton.jit
def _scores(query, key, num_classes, SCALE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Powers of two of the scores within each pixel, and their sums: [ROWS, ROWS], [ROWS]."""
    ROWS: tl.constexpr = query.shape[0]
    owner = tl.arange(0, ROWS) // num_classes
    scores = product(query, tl.trans(key), tl.zeros((ROWS, ROWS), DTYPE), PRECISION) * SCALE
    scores = tl.where(owner[:, None] == owner[None, :], scores, float("-inf"))
    scores = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return scores, tl.sum(scores, 1)


@triton.jit(do_not_specialize=["num_classes", "num_pixels", "width", "in_pixels", "in_width"])
def _class_attention_fwd_kernel(
    x,  # [B, K, H, W, C]; where POOL is false the pooled map
    query_text,  # [B, K, C]
    key_text,  # [B, K, C]
    query_weight,  # [C, C]
    key_weight,  # [C, C]
    value_weight,  # [C, C]
    value_bias,  # [C]
    out_weight,  # [C, C]
    out_bias,  # [C]
    mlp_gate_weight,  # [M, C]
    mlp_gate_bias,  # [M]
    mlp_value_weight,  # [M, C]
    mlp_value_bias,  # [M]
    mlp_out_weight,  # [C, M]
    mlp_out_bias,  # [C]
    drop_attention,  # [B, h, w] or None
    drop_mlp,  # [B, h, w] or None
    pooled,  # [B, K, h, w, C]
    out,  # [B, K, h, w, C]
    num_classes,
    num_pixels,  # h w
    width,  # w
    in_pixels,  # H W
    in_width,  # W
    C: tl.constexpr,
    HEADS: tl.constexpr,
    HIDDEN: tl.constexpr,  # M; 0 ends with the attention
    EPS: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) over the square root of the head width
    POOL: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,  # normalised rows are kept as one tile, not read STEP channels at a time
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, _, pixel, label, there = _rows(num_classes, 0, num_pixels, ROWS)
    c, d, m = tl.arange(0, CHANNELS), tl.arange(0, HEAD), tl.arange(0, CHUNK)
    inside = there[:, None] & (c < C)[None, :]
    dtype = x.dtype.element_ty
    # Offsets within an image fit into 32 bits, and into half the registers.
    place = (label * num_pixels + pixel) * C
    pooled_rows = pooled + image * num_classes * num_pixels * C + place
    rows = out + image * num_classes * num_pixels * C + place
    query_text += image * num_classes * C
    key_text += image * num_classes * C
    if POOL:
        corner = label * in_pixels + _corner(pixel, width, in_width)
        corners = x + image * num_classes * in_pixels * C + (corner * C)[:, None] + c[None, :]
        tile = tl.zeros((ROWS, CHANNELS), DTYPE)
        for line in range(2):  # a loop: four tiles at once would need too many registers
            tile += tl.load(corners + line * in_width * C, mask=inside, other=0.0).to(DTYPE)
            tile += tl.load(corners + (line * in_width + 1) * C, mask=inside, other=0.0).to(DTYPE)
        tile = (tile * 0.25).to(dtype)  # what the backward pass starts from
        tl.store(pooled_rows[:, None] + c[None, :], tile, mask=inside)
    else:
        tile = tl.load(pooled_rows[:, None] + c[None, :], mask=inside, other=0.0)
    z, mean, inverse = normalized(tile.to(DTYPE), C, EPS)
    if WHOLE:
        _place(rows[:, None] + c[None, :], z, inside)
        held = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0)
        tl.debug_barrier()  # before the heads overwrite it
    else:
        held: tl.constexpr = None
    for head in tl.range(HEADS, disable_licm=True):
        hd = head * (C // HEADS) + d
        real = d < C // HEADS
        query = _head(
            *(held, pooled_rows, mean, inverse, there, query_text + label * C, query_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        key = _head(
            *(held, pooled_rows, mean, inverse, there, key_text + label * C, key_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        value = _head(
            *(held, pooled_rows, mean, inverse, there, value_bias + label * 0, value_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        scores, total = _scores(query, key, num_classes, SCALE, DTYPE, PRECISION)
        mixed = product(scores.to(dtype), value, tl.zeros((ROWS, HEAD), DTYPE), PRECISION) / total[:, None]
        tl.store(rows[:, None] + hd[None, :], mixed.to(dtype), mask=there[:, None] & real[None, :])
    tl.debug_barrier()

    # The same rows in other dtypes, so that they need no registers in between.
    image, _, pixel, label, there = _rows(num_classes, 0, num_pixels, ROWS, tl.uint32)
    inside = there[:, None] & (c < C)[None, :]
    place = (label * num_pixels + pixel) * C
    pooled_rows = pooled + image * num_classes * num_pixels * C + place
    rows = out + image * num_classes * num_pixels * C + place
    u = _projected(
        *(None, rows, None, None, there, out_weight + c * C, c < C, tl.zeros((ROWS, CHANNELS), DTYPE)),
        *(C, CHANNELS, STEP, PRECISION),
    )
    u += tl.load(out_bias + c, mask=c < C, other=0.0).to(DTYPE)[None, :]
    if drop_attention is not None:
        u *= tl.load(drop_attention + image * num_pixels + pixel, mask=there, other=0.0).to(DTYPE)[:, None]
    u += tl.load(pooled_rows[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)

    if HIDDEN > 0:
        _place(rows[:, None] + c[None, :], u, inside)
        z, mean, inverse = normalized(u, C, EPS)
        if WHOLE:
            held = z.to(dtype)
        u = tl.zeros((ROWS, CHANNELS), DTYPE)
        for start in range(0, HIDDEN, CHUNK):
            unit = start + m
            known = unit < HIDDEN
            gate = tl.zeros((ROWS, CHUNK), DTYPE)
            gate += tl.load(mlp_gate_bias + unit, mask=known, other=0.0).to(DTYPE)[None, :]
            gate = _projected(
                *(held, rows, mean, inverse, there, mlp_gate_weight + unit * C, known, gate),
                *(C, CHANNELS, STEP, PRECISION),
            )
            value = tl.zeros((ROWS, CHUNK), DTYPE)
            value += tl.load(mlp_value_bias + unit, mask=known, other=0.0).to(DTYPE)[None, :]
            value = _projected(
                *(held, rows, mean, inverse, there, mlp_value_weight + unit * C, known, value),
                *(C, CHANNELS, STEP, PRECISION),
            )
            units = relu6(gate) * value  # [ROWS, CHUNK]
            columns = mlp_out_weight + unit[:, None] + c[None, :] * HIDDEN
            factor = tl.load(columns, mask=known[:, None] & (c < C)[None, :], other=0.0)  # [CHUNK, CHANNELS]
            u = product(units.to(dtype), factor, u, PRECISION)
        _, _, pixel, label, there = _rows(num_classes, 0, num_pixels, ROWS, tl.int64)
        inside = there[:, None] & (c < C)[None, :]
        rows = out + image * num_classes * num_pixels * C + (label * num_pixels + pixel) * C
        u += tl.load(mlp_out_bias + c, mask=c < C, other=0.0).to(DTYPE)[None, :]
        u = relu6(u)
        if drop_mlp is not None:
            u *= tl.load(drop_mlp + image * num_pixels + pixel, mask=there, other=0.0).to(DTYPE)[:, None]
        u += tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)
    tl.debug_barrier()
    tl.store(rows[:, None] + c[None, :], u.to(dtype), mask=inside)


@triton.jit(
    do_not_specialize=["num_classes", "num_pixels", "width", "in_pixels", "in_width", "first_pixel", "part_pixels"]
)
def _class_attention_bwd_kernel(
    grad,  # [B, K, h, w, C]: of the sum of pooled map and attention
    pooled,  # [B, K, h, w, C]
    query_text,  # [B, K, C]
    key_text,  # [B, K, C]
    query_weight,  # [C, C]
    key_weight,  # [C, C]
    value_weight,  # [C, C]
    value_bias,  # [C]
    out_weight,  # [C, C]
    drop_attention,  # [B, h, w] or None
    operands,  # [B, part of h w, K, 6, C]: z, branch, mixture, gradients of query, key and value
    x_grad,  # [B, K, H, W, C] or None
    num_classes,
    num_pixels,  # h w
    width,  # w
    in_pixels,  # H W
    in_width,  # W
    first_pixel,  # of the part of a map
    part_pixels,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,  # normalised rows are kept as one tile, not read STEP channels at a time
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    image, first_row, pixel, label, there = _rows(num_classes, first_pixel, part_pixels, ROWS)
    r, c, d = tl.arange(0, ROWS), tl.arange(0, CHANNELS), tl.arange(0, HEAD)
    inside = there[:, None] & (c < C)[None, :]
    dtype = pooled.dtype.element_ty
    place = (label * num_pixels + pixel) * C
    pooled += image * num_classes * num_pixels * C
    grad += image * num_classes * num_pixels * C
    query_text += image * num_classes * C
    key_text += image * num_classes * C
    rows = operands + first_row * (6 * C) + r * (6 * C)

    tile = tl.load(pooled + place[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)
    z, _, inverse = normalized(tile, C, EPS)
    _place(rows[:, None] + c[None, :], z, inside)
    g = tl.load(grad + place[:, None] + c[None, :], mask=inside, other=0.0)
    if drop_attention is not None:
        kept = tl.load(drop_attention + image * num_pixels + pixel, mask=there, other=0.0)
        g = (g.to(DTYPE) * kept.to(DTYPE)[:, None]).to(dtype)
    _place(rows[:, None] + C + c[None, :], g, inside)
    if WHOLE:
        held = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0)
        held_grad = tl.load(rows[:, None] + C + c[None, :], mask=inside, other=0.0)
    else:
        held: tl.constexpr = None
        held_grad: tl.constexpr = None

    for head in tl.range(HEADS, disable_licm=True):
        hd = head * (C // HEADS) + d
        real = d < C // HEADS
        query = _head(
            *(held, rows, None, None, there, query_text + label * C, query_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        key = _head(
            *(held, rows, None, None, there, key_text + label * C, key_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        scores, total = _scores(query, key, num_classes, SCALE, DTYPE, PRECISION)
        value = _head(
            *(held, rows, None, None, there, value_bias + label * 0, value_weight),
            *(hd, real, C, CHANNELS, STEP, DTYPE, PRECISION),
        )
        do = _projected(
            *(held_grad, rows + C, None, None, there, out_weight + hd, real, tl.zeros((ROWS, HEAD), DTYPE)),
            *(C, CHANNELS, STEP, PRECISION, C),
        ).to(dtype)
        shares = scores / total[:, None]
        ds = product(do, tl.trans(value), tl.zeros((ROWS, ROWS), DTYPE), PRECISION)
        ds = shares * (ds - tl.sum(shares * ds, 1)[:, None]) * (SCALE * LN2)
        ds = ds.to(dtype)
        shares = shares.to(dtype)
        mixed = product(shares, value, tl.zeros((ROWS, HEAD), DTYPE), PRECISION)
        dv = product(tl.trans(shares), do, tl.zeros((ROWS, HEAD), DTYPE), PRECISION).to(dtype)
        dq = product(ds, key, tl.zeros((ROWS, HEAD), DTYPE), PRECISION).to(dtype)
        dk = product(tl.trans(ds), query, tl.zeros((ROWS, HEAD), DTYPE), PRECISION).to(dtype)

        there_real = there[:, None] & real[None, :]
        of_head = rows[:, None] + hd[None, :]
        tl.store(of_head + 2 * C, mixed.to(dtype), mask=there_real)
        tl.store(of_head + 3 * C, dq, mask=there_real)
        tl.store(of_head + 4 * C, dk, mask=there_real)
        tl.store(of_head + 5 * C, dv, mask=there_real)

    if x_grad is not None:
        tl.debug_barrier()
        # The same rows in another dtype, so that they need no registers in between.
        _, _, pixel, label, there = _rows(num_classes, first_pixel, part_pixels, ROWS, tl.uint32)
        inside = there[:, None] & (c < C)[None, :]
        place = (label * num_pixels + pixel) * C
        dz = tl.zeros((ROWS, CHANNELS), DTYPE)
        dz = _projected(
            *(None, rows + 3 * C, None, None, there, query_weight + c, c < C, dz),
            *(C, CHANNELS, STEP, PRECISION, C),
        )
        dz = _projected(
            *(None, rows + 4 * C, None, None, there, key_weight + c, c < C, dz),
            *(C, CHANNELS, STEP, PRECISION, C),
        )
        dz = _projected(
            *(None, rows + 5 * C, None, None, there, value_weight + c, c < C, dz),
            *(C, CHANNELS, STEP, PRECISION, C),
        )
        z = tl.load(rows[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)
        dz -= (tl.sum(dz, 1) / C)[:, None] + z * (tl.sum(dz * z, 1) / C)[:, None]
        dz *= inverse[:, None]
        dz += tl.load(grad + place[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)
        dx = (dz * 0.25).to(dtype)
        corner = label * in_pixels + _corner(pixel, width, in_width)
        corners = x_grad + image * num_classes * in_pixels * C + (corner * C)[:, None] + c[None, :]
        tl.store(corners, dx, mask=inside)
        tl.store(corners + C, dx, mask=inside)
        tl.store(corners + in_width * C, dx, mask=inside)
        tl.store(corners + (in_width + 1) * C, dx, mask=inside)
