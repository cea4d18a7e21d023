"""LayerNorm and gated MLP in one launch: the hidden activations never leave the chip.

A program owns a block of tokens and walks over the hidden units in chunks. Its normalised tokens are the first operand
of every product, its sums [tokens, C] stay in registers until the walk ends. The backward kernel makes the hidden units
again, sums up the gradient of the tokens, and writes what the gradients of the weights are products of; those are left
to the BLAS, slab by slab of tokens, so that what is written stays below ``SLAB_BYTES`` whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, relu6
from errseg.ops.slabs import add_product

SLAB_BYTES = 128 << 20  # of normalised tokens, hidden units and their gradients, alive at a time in the backward pass


@triton.jit
def _normalized(x, inside, channels, EPS: tl.constexpr):
    """Rows of ``x`` with mean 0 and variance 1, and what they were multiplied with; 0 outside."""
    count = tl.full((), channels, x.dtype)
    centred = tl.where(inside, x - (tl.sum(x, 1) / count)[:, None], 0.0)
    inverse_deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / count + EPS)
    return centred * inverse_deviation[:, None], inverse_deviation


@triton.jit
def _store_normalized(x, normalized, offsets, inside, channels, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Normalised tokens by way of memory: what is loaded is multiplied out of shared memory, not out of registers."""
    tile = tl.load(x + offsets, mask=inside, other=0.0)
    z, _ = _normalized(tile.to(DTYPE), inside, channels, EPS)
    tl.store(normalized + offsets, z.to(tile.dtype), mask=inside)
    tl.debug_barrier()


@triton.jit
def _project(
    normalized,  # the program's rows of [N, C]
    grad,
    there,  # [TOKENS, 1]: which rows there are
    gate_weight,  # from the chunk's first row on
    value_weight,
    out_weight,  # from the chunk's first column on
    channels,
    hidden,
    BACKWARD: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gate and value of a chunk and the gradient of its units, STEP channels at a time."""
    t, m, s = tl.arange(0, TOKENS), tl.arange(0, CHUNK), tl.arange(0, STEP)
    gate = tl.zeros((TOKENS, CHUNK), DTYPE)
    value = tl.zeros((TOKENS, CHUNK), DTYPE)
    dunits = tl.zeros((TOKENS, CHUNK), DTYPE)
    for c in range(0, CHANNELS, STEP):
        rows = t[:, None] * channels + c + s[None, :]
        inside = there & (c + s < channels)[None, :]
        z = tl.load(normalized + rows, mask=inside, other=0.0)  # [TOKENS, STEP]
        tile = m[:, None] * CHANNELS + c + s[None, :]  # [CHUNK, STEP]
        gate = tl.dot(z, tl.load(gate_weight + tile).T, gate, input_precision=PRECISION, out_dtype=DTYPE)
        value = tl.dot(z, tl.load(value_weight + tile).T, value, input_precision=PRECISION, out_dtype=DTYPE)
        if BACKWARD:
            g = tl.load(grad + rows, mask=inside, other=0.0)
            tile = (c + s)[:, None] * hidden + m[None, :]  # [STEP, CHUNK]
            dunits = tl.dot(g, tl.load(out_weight + tile), dunits, input_precision=PRECISION, out_dtype=DTYPE)
    return gate, value, dunits


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_mlp_fwd_kernel(
    x,  # [N, C]
    gate_weight,  # [M, CHANNELS], M a multiple of CHUNK
    gate_bias,  # [M]
    value_weight,  # [M, CHANNELS]
    value_bias,  # [M]
    out_weight,  # [CHANNELS, M]
    out_bias,  # [CHANNELS]
    out,  # [N, C]
    num_tokens,
    channels,
    hidden,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t, c, m = tl.arange(0, TOKENS), tl.arange(0, CHANNELS), tl.arange(0, CHUNK)
    there = (t < num_tokens - first)[:, None]
    inside = there & (c < channels)[None, :]
    offsets = t[:, None] * channels + c[None, :]
    normalized = out + first * channels  # until the result overwrites them
    _store_normalized(x + first * channels, normalized, offsets, inside, channels, EPS, DTYPE)
    if STEP == CHANNELS:
        z = tl.load(normalized + offsets, mask=inside, other=0.0)

    in_tile = m[:, None] * CHANNELS + c[None, :]  # [CHUNK, CHANNELS]
    out_tile = c[:, None] * hidden + m[None, :]  # [CHANNELS, CHUNK]
    total = tl.zeros((TOKENS, CHANNELS), DTYPE)
    for unit in range(0, hidden, CHUNK):
        gate_offset = tl.load(gate_bias + unit + m).to(DTYPE)[None, :]
        value_offset = tl.load(value_bias + unit + m).to(DTYPE)[None, :]
        gate_rows, value_rows = gate_weight + unit * CHANNELS, value_weight + unit * CHANNELS
        if STEP == CHANNELS:
            gate = tl.dot(z, tl.load(gate_rows + in_tile).T, input_precision=PRECISION, out_dtype=DTYPE)
            value = tl.dot(z, tl.load(value_rows + in_tile).T, input_precision=PRECISION, out_dtype=DTYPE)
        else:
            gate, value, _ = _project(
                *(normalized, normalized, there, gate_rows, value_rows, out_weight, channels, hidden),
                *(False, DTYPE, PRECISION, TOKENS, CHANNELS, CHUNK, STEP),
            )
        gate += gate_offset
        value += value_offset
        units = (relu6(gate) * value).to(x.dtype.element_ty)  # [TOKENS, CHUNK]
        back_tile = tl.load(out_weight + unit + out_tile)
        total = tl.dot(units, back_tile.T, total, input_precision=PRECISION, out_dtype=DTYPE)
    total += tl.load(out_bias + c).to(DTYPE)[None, :]

    # Other offsets than above (64 bits), so that none is kept in registers throughout the loop.
    t64 = first + t
    inside = (t64 < num_tokens)[:, None] & (c < channels)[None, :]
    tl.store(out + t64[:, None] * channels + c[None, :], total.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "store_gradient", "store_gates", "store_units"])
def _gated_mlp_bwd_kernel(
    grad,  # [N, C]: of the output
    x,  # [N, C]
    gate_weight,  # [M, CHANNELS], M a multiple of CHUNK
    gate_bias,  # [M]
    value_weight,  # [M, CHANNELS]
    value_bias,  # [M]
    out_weight,  # [CHANNELS, M]
    gradient,  # [N, C]: of x
    normalized,  # [N, C]
    gates,  # [N, 2 M]: gradients of gate and value
    units,  # [N, M]: what out_weight multiplies
    num_tokens,
    channels,
    hidden,
    store_gradient,  # 0 or 1, as are the next two
    store_gates,
    store_units,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t, c, m = tl.arange(0, TOKENS), tl.arange(0, CHANNELS), tl.arange(0, CHUNK)
    there = (t < num_tokens - first)[:, None]
    inside = there & (c < channels)[None, :]
    offsets = t[:, None] * channels + c[None, :]
    z_rows, g_rows = normalized + first * channels, grad + first * channels
    _store_normalized(x + first * channels, z_rows, offsets, inside, channels, EPS, DTYPE)
    if STEP == CHANNELS:
        z = tl.load(z_rows + offsets, mask=inside, other=0.0)
        g = tl.load(g_rows + offsets, mask=inside, other=0.0)

    in_tile = m[:, None] * CHANNELS + c[None, :]  # [CHUNK, CHANNELS]
    out_tile = c[:, None] * hidden + m[None, :]  # [CHANNELS, CHUNK]
    gates += first * (2 * hidden)
    units += first * hidden
    gates_tile = t[:, None] * (2 * hidden) + m[None, :]  # [TOKENS, CHUNK]
    units_tile = t[:, None] * hidden + m[None, :]
    dz = tl.zeros((TOKENS, CHANNELS), DTYPE)
    for unit in range(0, hidden, CHUNK):
        gate_offset = tl.load(gate_bias + unit + m).to(DTYPE)[None, :]
        value_offset = tl.load(value_bias + unit + m).to(DTYPE)[None, :]
        gate_rows, value_rows = gate_weight + unit * CHANNELS, value_weight + unit * CHANNELS
        back_columns = out_weight + unit
        if STEP == CHANNELS:
            gate_tile = tl.load(gate_rows + in_tile)
            value_tile = tl.load(value_rows + in_tile)
            gate = tl.dot(z, gate_tile.T, input_precision=PRECISION, out_dtype=DTYPE)
            value = tl.dot(z, value_tile.T, input_precision=PRECISION, out_dtype=DTYPE)
            dunits = tl.dot(g, tl.load(back_columns + out_tile), input_precision=PRECISION, out_dtype=DTYPE)
        else:
            gate, value, dunits = _project(
                *(z_rows, g_rows, there, gate_rows, value_rows, back_columns, channels, hidden),
                *(True, DTYPE, PRECISION, TOKENS, CHANNELS, CHUNK, STEP),
            )
            gate_tile = tl.load(gate_rows + in_tile)
            value_tile = tl.load(value_rows + in_tile)
        gate += gate_offset
        value += value_offset
        clipped = relu6(gate)
        dgate = tl.where((gate <= 0.0) | (gate >= 6.0), 0.0, dunits * value).to(x.dtype.element_ty)
        dvalue = (dunits * clipped).to(x.dtype.element_ty)
        tl.store(units + unit + units_tile, (clipped * value).to(x.dtype.element_ty), mask=there & (store_units != 0))
        tl.store(gates + unit + gates_tile, dgate, mask=there & (store_gates != 0))
        tl.store(gates + (hidden + unit) + gates_tile, dvalue, mask=there & (store_gates != 0))
        dz = tl.dot(dgate, gate_tile, dz, input_precision=PRECISION, out_dtype=DTYPE)
        dz = tl.dot(dvalue, value_tile, dz, input_precision=PRECISION, out_dtype=DTYPE)

    # Other offsets than above (64 bits), so that none is kept in registers throughout the loop.
    t64 = first + t
    inside = (t64 < num_tokens)[:, None] & (c < channels)[None, :]
    offsets = t64[:, None] * channels + c[None, :]
    tile = tl.load(x + offsets, mask=inside, other=0.0).to(DTYPE)
    exact_z, inverse_deviation = _normalized(tile, inside, channels, EPS)
    count = tl.full((), channels, DTYPE)
    dz -= (tl.sum(dz, 1) / count)[:, None] + exact_z * (tl.sum(dz * exact_z, 1) / count)[:, None]
    dz *= inverse_deviation[:, None]
    tl.store(gradient + offsets, dz.to(x.dtype.element_ty), mask=inside & (store_gradient != 0))


# By the channels that a program holds: (tokens, hidden units, channels of a step), warps, stages. With all channels in
# one step the tokens are loaded once; float32, whose operands are split in two, has no room for that.
_HALF_FWD = {64: ((128, 64, 64), 8, 3), 128: ((128, 32, 128), 8, 3), 256: ((64, 32, 256), 8, 2)}
_HALF_BWD = {64: ((64, 32, 64), 4, 3), 128: ((64, 32, 128), 4, 3), 256: ((64, 32, 32), 8, 2)}
_SINGLE_FWD = {64: ((64, 32, 32), 8, 2), 128: ((64, 32, 32), 8, 2), 256: ((32, 16, 16), 8, 2)}
_SINGLE_BWD = {64: ((64, 16, 16), 8, 2), 128: ((64, 16, 16), 8, 2), 256: ((32, 16, 16), 8, 2)}
_DOUBLE = {64: ((16, 16, 64), 4, 1), 256: ((16, 16, 16), 4, 1)}
_TILES = {
    torch.float32: (_SINGLE_FWD, _SINGLE_BWD),
    torch.bfloat16: (_HALF_FWD, _HALF_BWD),
    torch.float16: (_HALF_FWD, _HALF_BWD),
    torch.float64: (_DOUBLE, _DOUBLE),
}
_KERNELS = (("fwd", _gated_mlp_fwd_kernel, 8, (76800, 128, 384)), ("bwd", _gated_mlp_bwd_kernel, 11, (51200, 128, 384)))
CONFIGS: dict[str, Config] = {}
for _dtype, _both in _TILES.items():
    for (_pass, _kernel, _tensors, _sizes), _tiles in zip(_KERNELS, _both, strict=True):
        for _channels, (_tile, _warps, _stages) in _tiles.items():
            CONFIGS[f"{_pass} {_dtype} {_channels}"] = Config(
                _kernel,
                (_dtype,) * _tensors + _sizes + ((1, 1, 1) if _pass == "bwd" else ()),
                {
                    "EPS": 1e-5,
                    "DTYPE": LANGUAGE_DTYPE[torch.promote_types(_dtype, torch.float32)],
                    "PRECISION": "tf32x3" if _dtype == torch.float32 else "ieee",
                    "CHANNELS": _channels,
                    **dict(zip(("TOKENS", "CHUNK", "STEP"), _tile, strict=True)),
                },
                _warps,
                _stages,
                max_registers=255 if _dtype.itemsize > 2 or _channels == 256 else None,
            )


def forward(x: Tensor, *weights_and_eps: Any) -> Tensor:
    """[..., C] -> [..., C]; see :func:`errseg.ops.gated_mlp`."""
    *weights, eps = weights_and_eps
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(x.shape)
    fwd = _config("fwd", x, eps)
    padded, hidden = _padded(fwd, *weights)
    if len(tokens):
        grid = (triton.cdiv(len(tokens), fwd.constants["TOKENS"]),)
        fwd.launch(grid, tokens, *padded, out, *tokens.shape, hidden)
    return out


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of ``x`` and of the six weights where ``needed`` asks for them."""
    *weights, eps, needed = arguments
    tokens, grad = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, grad))
    num_tokens, channels = tokens.shape
    bwd = _config("bwd", x, eps)
    padded, hidden = _padded(bwd, *weights)
    sums = _WeightGradients(x, hidden, needed)
    flags = needed[0], sums.wants_gates, sums.wants_units

    columns = channels + (2 * sums.wants_gates + sums.wants_units) * hidden
    slab = _slab(num_tokens, columns * x.element_size(), bwd.constants["TOKENS"])
    dx = torch.empty_like(tokens) if needed[0] else x.new_empty(0)
    normalized = x.new_empty(slab, channels)
    gates = x.new_empty((slab, 2 * hidden) if sums.wants_gates else 0)
    units = x.new_empty((slab, hidden) if sums.wants_units else 0)
    for start in range(0, num_tokens if any(flags) else 0, slab):
        rows = slice(start, min(start + slab, num_tokens))
        size = rows.stop - start
        grid = (triton.cdiv(size, bwd.constants["TOKENS"]),)
        results = dx[rows], normalized, gates, units
        bwd.launch(grid, grad[rows], tokens[rows], *padded[:5], *results, size, channels, hidden, *map(int, flags))
        sums.add(grad[rows], normalized[:size], gates[:size], units[:size])

    d_out_bias = grad.sum(0, dtype=sums.dtype) if needed[6] else x.new_empty(0)
    of_weights = *sums.unpadded(len(weights[0])), d_out_bias
    return [dx.view(x.shape) if needed[0] else dx, *(g.to(x.dtype, copy=True) for g in of_weights)]


class _WeightGradients:
    """Sums over the slabs, in float32 or better, of the gradients that ``needed`` asks for; others are empty."""

    def __init__(self, x: Tensor, hidden: int, needed: Sequence[bool]) -> None:
        _, gate_weight, gate_bias, value_weight, value_bias, out_weight, _ = needed
        self.wants_weights, self.wants_biases = gate_weight or value_weight, gate_bias or value_bias
        self.wants_gates, self.wants_units = self.wants_weights or self.wants_biases, out_weight
        self.dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        self.in_weights = x.new_zeros(2, hidden * self.wants_weights, channels, dtype=self.dtype)
        self.in_biases = x.new_zeros(2, hidden * self.wants_biases, dtype=self.dtype)
        self.out_weight = x.new_zeros(channels, hidden * self.wants_units, dtype=self.dtype)

    def add(self, grad: Tensor, normalized: Tensor, gates: Tensor, units: Tensor) -> None:
        """The share of a slab: [N, C], [N, C], [N, 2 M], [N, M]."""
        if self.wants_weights:
            add_product(self.in_weights.flatten(0, 1), gates, normalized)
        if self.wants_biases:
            self.in_biases += gates.sum(0, dtype=self.dtype).view(2, -1)
        if self.wants_units:
            add_product(self.out_weight, grad, units)

    def unpadded(self, num_hidden: int) -> list[Tensor]:
        """Of gate and value, each weight and bias, and of the output's weight, for the units that there are."""
        first = slice(0, num_hidden)
        of_halves = [half[first] for pair in zip(self.in_weights, self.in_biases, strict=True) for half in pair]
        return [*of_halves, self.out_weight[:, first]]


def _config(direction: str, x: Tensor, eps: float) -> Config:
    """The launch for these tokens: with the fewest channels that hold theirs, and their epsilon."""
    block = next(block for block in _TILES[x.dtype][0] if block >= x.shape[-1])
    config = CONFIGS[f"{direction} {x.dtype} {block}"]
    return replace(config, constants={**config.constants, "EPS": eps})


def _padded(config: Config, *weights: Tensor) -> tuple[list[Tensor], int]:
    """The six weights with zeros up to whole tiles, which change no sum, and M with them."""
    num_hidden, channels = weights[0].shape
    rows, columns = -num_hidden % config.constants["CHUNK"], config.constants["CHANNELS"] - channels
    paddings = (0, columns, 0, rows), (0, rows), (0, columns, 0, rows), (0, rows), (0, rows, 0, columns), (0, columns)
    padded = [F.pad(w, p) if any(p) else w.contiguous() for w, p in zip(weights, paddings, strict=True)]
    return padded, num_hidden + rows


def _slab(num_tokens: int, row_bytes: int, block: int) -> int:
    """Tokens of a slab: whole blocks, as many as ``SLAB_BYTES`` allows, no slab much smaller than another."""
    blocks = max(1, triton.cdiv(num_tokens, block))
    slabs = triton.cdiv(blocks, max(1, SLAB_BYTES // (row_bytes * block)))
    return triton.cdiv(blocks, slabs) * block
