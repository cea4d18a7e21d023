"""Spatial attention: two launches forward, four backward beside the products of the weights' gradients.

Forward, the first launch turns the windows of a map into keys and values; the second normalises a tile of pixels,
makes the queries of one head after the other, attends with a running softmax, projects and adds to the input.

Backward, scores are made anew from the saved keys, values and log sums, and everything else from the input. The
transient memory is five times the input, and once more with drop path; see ``backward``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from errseg.kernels import _spatial_attention_bwd as bwd
from errseg.kernels import _spatial_attention_fwd as fwd
from errseg.kernels.common import LANGUAGE_DTYPE, Config, padded
from errseg.ops.spatial_windows import Handed, Sizes, zero_gradients

EPS = 1e-5  # of the published norms: what is checked ahead of time


class _Shape(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    channels: int
    heads: int
    stride: int
    eps: float

    @property
    def statistics(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def constants(self) -> dict[str, Any]:
        """Of every kernel that multiplies rows of channels."""
        return {
            "C": self.channels,
            "STRIDE": self.stride,
            "EPS": self.eps,
            "CHANNELS": padded(self.channels, 32),
            "DTYPE": LANGUAGE_DTYPE[self.statistics],
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "ieee",
        }

    @property
    def head_constants(self) -> dict[str, Any]:
        width = self.channels // self.heads
        return {"HEADS": self.heads, "HEAD": padded(width), "SCALE": math.log2(math.e) / width**0.5}


@functools.cache
def _keys_fwd(shape: _Shape) -> Config:
    constants = shape.constants
    wide = constants["CHANNELS"] > 128
    keys, columns, block, stages = {
        8: (16, 16, 256, 2),
        4: (32, 32, 32, 1),
        2: (64, 32 if wide else 64, 256, 2),
    }[shape.dtype.itemsize]
    constants |= {"KEYS": keys, "COLUMNS": columns, "BLOCK": min(block, constants["CHANNELS"])}
    arguments = (shape.dtype,) * 10 + (48, 40, 40)
    return Config(fwd._spatial_attention_keys_fwd_kernel, arguments, constants, num_warps=8, num_stages=stages)


@functools.cache
def _fwd(shape: _Shape) -> Config:
    constants = shape.constants | shape.head_constants
    wide = constants["CHANNELS"] > 128
    queries, keys, block, warps, stages = {
        8: (32, 32, 256, 8, 1),
        4: (16, 32, 32, 4, 2),
        2: (64, 32, 32, 8, 1) if wide else (128, 64, 256, 8, 2),
    }[shape.dtype.itemsize]
    constants |= {"QUERIES": queries, "KEYS": keys, "BLOCK": min(block, constants["CHANNELS"])}
    arguments = (shape.dtype,) * 10 + (shape.statistics, 48, 40, 40)
    return Config(fwd._spatial_attention_fwd_kernel, arguments, constants, warps, stages)


@functools.cache
def _queries_bwd(shape: _Shape) -> Config:
    constants = shape.constants | shape.head_constants
    wide = constants["CHANNELS"] > 128
    queries, keys, block, warps, stages = {
        8: (16, 32, 256, 8, 1),
        4: (16, 32, 32, 4, 2),
        2: (64, 32, 64, 8, 2) if wide else (128, 32, 256, 8, 2),
    }[shape.dtype.itemsize]
    constants |= {"QUERIES": queries, "KEYS": keys, "BLOCK": min(block, constants["CHANNELS"])}
    arguments = (shape.dtype,) * 8 + (shape.statistics, *(shape.dtype,) * 4, shape.statistics, 32, 40, 40)
    return Config(bwd._spatial_attention_queries_bwd_kernel, arguments, constants, warps, stages)


@functools.cache
def _keys_bwd(shape: _Shape) -> Config:
    constants = shape.constants | shape.head_constants
    constants = {name: constants[name] for name in ("C", "HEADS", "HEAD", "DTYPE", "PRECISION")}
    half = (32 if constants["HEAD"] > 32 else 64, 64)
    queries, keys = {8: (16, 16), 4: (16, 32), 2: half}[shape.dtype.itemsize]
    constants |= {"QUERIES": queries, "KEYS": keys}
    arguments = (shape.dtype,) * 4 + (shape.statistics,) * 2 + (shape.dtype,) * 2 + (400, 1600)
    return Config(bwd._spatial_attention_keys_bwd_kernel, arguments, constants, num_warps=4, num_stages=2)


@functools.cache
def _norm_bwd(shape: _Shape, out: int, per_key: bool) -> Config:
    columns = padded(out, 32)
    constants = {
        "OUT": out,
        "PER_KEY": per_key,
        "EPS": shape.eps,
        "COLUMNS": columns,
        "ROWS": max(1, 2048 // columns),
        "DTYPE": LANGUAGE_DTYPE[shape.statistics],
    }
    arguments = (shape.dtype,) * 3 + (32 * 400, 32, 400)
    return Config(bwd._spatial_attention_norm_bwd_kernel, arguments, constants, num_warps=4)


@functools.cache
def _bwd(shape: _Shape) -> Config:
    constants = shape.constants
    wide = constants["CHANNELS"] > 128
    half = (32, 64, 8) if wide else (64, 64, 4)
    windows, inner, warps = {8: (16, 16, 4), 4: (32, 32, 8), 2: half}[shape.dtype.itemsize]
    constants |= {"WINDOWS": windows, "INNER": inner}
    arguments = (shape.dtype,) * 9 + (40, 40)
    return Config(bwd._spatial_attention_bwd_kernel, arguments, constants, warps, num_stages=2)


def _configs(shape: _Shape) -> dict[str, Config]:
    name = f"{shape.dtype} {shape.channels}/{shape.heads}"
    return {
        f"keys fwd {name}": _keys_fwd(shape),
        f"fwd {name}": _fwd(shape),
        f"queries bwd {name}": _queries_bwd(shape),
        f"keys bwd {name}": _keys_bwd(shape),
        f"key norm bwd {name}": _norm_bwd(shape, 2 * shape.channels, True),
        f"value norm bwd {name}": _norm_bwd(shape, shape.channels, False),
        f"bwd {name}": _bwd(shape),
    }


CONFIGS: dict[str, Config] = {}
for _dtype in LANGUAGE_DTYPE:
    CONFIGS |= _configs(_Shape(_dtype, 128, 4, 2, EPS))
for _channels, _heads in ((64, 4), (256, 4)):
    CONFIGS |= _configs(_Shape(torch.bfloat16, _channels, _heads, 2, EPS))


def forward(
    x: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    query_weight: Tensor,
    key_reduce_weight: Tensor,
    key_weight: Tensor,
    value_reduce_weight: Tensor,
    value_reduce_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    drop_path: Tensor | None,
    num_heads: int,
    eps: float,
    training: bool,
) -> tuple[Tensor, ...]:
    """The result [B, K, H, W, C]; in training also mixture, log sums, keys and values, which ``backward`` takes."""
    sizes = Sizes.of(x, value_reduce_weight)
    shape = _Shape(x.dtype, sizes.channels, num_heads, sizes.window, eps)
    maps = sizes.num_classes, sizes.height, sizes.width
    x = x.contiguous()
    out = torch.empty_like(x)
    key = x.new_empty((*x.shape[:2], sizes.num_keys, sizes.channels))
    value = torch.empty_like(key)
    mixture = x.new_empty(x.shape if training else 0)
    log_sums = x.new_empty((*x.shape[:2], num_heads, sizes.num_tokens) if training else 0, dtype=shape.statistics)
    if x.numel():
        weights = key_reduce_weight, key_weight, value_reduce_weight, value_reduce_bias, value_weight, value_bias
        config = _keys_fwd(shape)
        grid = (sizes.maps * triton.cdiv(sizes.num_keys, config.constants["KEYS"]),)
        config.launch(grid, x, *(t.contiguous() for t in (key_map, *weights)), key, value, *maps)

        weights_and_bias = query_weight.contiguous(), out_weight.contiguous(), out_bias.contiguous()
        factors = None if drop_path is None else drop_path.to(x.dtype).contiguous()
        saved = (mixture, log_sums) if training else (None, None)
        config = _fwd(shape)
        grid = (sizes.maps * triton.cdiv(sizes.num_tokens, config.constants["QUERIES"]),)
        config.launch(grid, x, query_map.contiguous(), key, value, *weights_and_bias, factors, out, *saved, *maps)
    if not training:
        key, value = x.new_empty(0), x.new_empty(0)
    return out, mixture, log_sums, key, value


def _attention_backward(
    sizes: Sizes,
    shape: _Shape,
    grad: Tensor,
    x: Tensor,
    query_map: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    mixture: Tensor,
    log_sums: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised pixels, and the gradients of queries, keys and values."""
    z = x.new_empty((*x.shape[:2], sizes.num_tokens, sizes.channels))
    query, mixture_grad, query_grad = (torch.empty_like(z) for _ in range(3))
    deltas, key_grad, value_grad = torch.empty_like(log_sums), torch.empty_like(key), torch.empty_like(value)
    config = _queries_bwd(shape)
    grid: tuple[int, ...] = (sizes.maps * triton.cdiv(sizes.num_tokens, config.constants["QUERIES"]),)
    arguments = grad, x, query_map, key, value, query_weight, out_weight, mixture, log_sums
    outputs = z, query, mixture_grad, query_grad, deltas
    config.launch(grid, *arguments, *outputs, sizes.num_classes, sizes.height, sizes.width)

    config = _keys_bwd(shape)
    grid = sizes.maps * triton.cdiv(sizes.num_keys, config.constants["KEYS"]), shape.heads
    inputs = query, mixture_grad, key, value, log_sums, deltas
    config.launch(grid, *inputs, key_grad, value_grad, sizes.num_keys, sizes.num_tokens)
    return z, query_grad, key_grad, value_grad


def _projection_backward(
    shape: _Shape,
    grad: Tensor,  # [B, K, N_kv, C]: of keys or values
    windows: Tensor,  # [B K N_kv, r r C]
    reduce_weight: Tensor,  # [OUT, r r C]
    added: Tensor,  # [B, N_kv, OUT] or [OUT]
    weight: Tensor,  # [C, OUT]
) -> tuple[Tensor, Tensor]:
    """Normalised reduced windows and the gradient of the reduced ones, both [B K N_kv, OUT]."""
    reduced = windows @ reduce_weight.T
    gradient = grad.flatten(0, 2) @ weight
    num_rows, out = reduced.shape
    config = _norm_bwd(shape, out, added.ndim > 1)
    grid = (triton.cdiv(num_rows, config.constants["ROWS"]),)
    config.launch(grid, reduced, gradient, added, num_rows, grad.shape[1], grad.shape[2])
    return reduced, gradient


def backward(
    grad: Tensor,
    x: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    query_weight: Tensor,
    key_reduce_weight: Tensor,
    key_weight: Tensor,
    value_reduce_weight: Tensor,
    value_reduce_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    drop_path: Tensor | None,
    num_heads: int,
    eps: float,
    mixture: Tensor,
    log_sums: Tensor,
    key: Tensor,
    value: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the differentiable arguments, in their order.

    Transient, with X the bytes of ``x``: normalised pixels, queries, gradients of queries and of the mixture 4 X, of
    keys and values X / 2; then, without queries and the mixture's, reduced windows and their gradients 3 X / 2, and
    the result X: 5 X. Drop path makes the gradient of the branch, X.
    """
    if not x.numel():
        weights = query_weight, key_reduce_weight, key_weight, value_reduce_weight, value_reduce_bias, value_weight
        return zero_gradients(x, query_map, key_map, *weights, value_bias, out_weight, out_bias)
    sizes = Sizes.of(x, value_reduce_weight)
    shape = _Shape(x.dtype, sizes.channels, num_heads, sizes.window, eps)
    x, grad, query_map, key_map, query_weight = (t.contiguous() for t in (x, grad, query_map, key_map, query_weight))
    key_reduce_weight, value_reduce_weight = key_reduce_weight.contiguous(), value_reduce_weight.contiguous()
    branch = grad if drop_path is None else grad * drop_path[:, :, None, None, None].to(grad.dtype)
    z, query_grad, key_grad, value_grad = _attention_backward(
        *(sizes, shape, branch, x, query_map, query_weight, out_weight.contiguous(), mixture, log_sums, key, value)
    )
    windows = sizes.whole_windows(z).flatten(0, 3)  # a view of an even map
    reduced_key, reduced_key_grad = _projection_backward(
        shape, key_grad, windows, key_reduce_weight, key_map, key_weight
    )
    reduced_value, reduced_value_grad = _projection_backward(
        shape, value_grad, windows, value_reduce_weight, value_reduce_bias.contiguous(), value_weight
    )
    x_grad = torch.empty_like(x)
    config = _bwd(shape)
    grid = (sizes.maps * triton.cdiv(math.prod(sizes.windows), config.constants["WINDOWS"]) * sizes.window**2,)
    arguments = grad, x, query_grad, reduced_key_grad, reduced_value_grad
    config.launch(
        grid, *arguments, query_weight, key_reduce_weight, value_reduce_weight, x_grad, sizes.height, sizes.width
    )

    of_keys, of_values = (reduced_key, reduced_key_grad), (reduced_value, reduced_value_grad)
    handed = Handed(z, query_grad, key_grad, value_grad, windows, *of_keys, *of_values)
    return handed.gradients(sizes, x_grad, branch, mixture)
