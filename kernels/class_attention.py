"""The class block from pooling to its low-resolution output, for any number of classes.

Where the classes fit into the rows of one tile, the forward pass is one launch: a program pools some pixels with all of
their classes and takes them through attention and MLP. The pooled map and sums pass through memory only where its own
program reads them again. With more classes, products with the weights are left to the BLAS, and attention runs over
tiles of classes.

Backward starts from the pooled map. The sum of map and attention is made again, the gated MLP's own kernels give its
gradients, and one more kernel those of the attention. What the weights' gradients are products of is written slab by
slab of pixels, of at most ``SLAB_BYTES`` (the MLP's as much again, before), and multiplied by the BLAS. Scores never
reach memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from errseg.kernels import _class_attention_stream as stream
from errseg.kernels import _class_attention_tile as tile
from errseg.kernels import gated_mlp
from errseg.kernels.common import LANGUAGE_DTYPE, Config

EPS = 1e-5  # of the published norms: what is checked ahead of time
SLAB_BYTES = 128 << 20


class _Shape(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    channels: int
    heads: int
    hidden: int
    eps: float

    @property
    def statistics(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def heavy(self) -> bool:
        """Whether registers suffice for half the rows only."""
        return self.channels > 128 or self.channels // self.heads > 32

    @property
    def constants(self) -> dict[str, Any]:
        """Of every kernel."""
        width = self.channels // self.heads
        return {
            "C": self.channels,
            "HEADS": self.heads,
            "SCALE": math.log2(math.e) / width**0.5,
            "HEAD": _padded(width),
            "DTYPE": LANGUAGE_DTYPE[self.statistics],
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "ieee",
        }

    @property
    def tile_constants(self) -> dict[str, Any]:
        """Of the kernels that take rows of channels."""
        channels = _padded(self.channels)
        whole = self.dtype.itemsize == 2 and not self.heavy
        return self.constants | {
            "EPS": self.eps,
            "CHANNELS": channels,
            "WHOLE": whole,
            "STEP": max(16, channels // 2) if whole else 16,
        }


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@functools.cache
def _fwd(shape: _Shape, pool: bool) -> Config:
    """With pooling the whole block; without, from the pooled map to its sum with the attention."""
    size = shape.dtype.itemsize
    rows, warps, stages, registers = {8: (16, 4, 1, None), 4: (64, 8, 1, 255), 2: (128, 8, 2, None)}[size]
    constants = shape.tile_constants | {"HIDDEN": shape.hidden if pool else 0, "POOL": pool}
    constants |= {"ROWS": max(16, rows // 2) if shape.heavy else rows, "CHUNK": 32 if size == 2 else 16}
    arguments = (shape.dtype,) * 19 + (48, 400, 20, 1600, 40)
    return Config(tile._class_attention_fwd_kernel, arguments, constants, warps, stages, registers)


@functools.cache
def _bwd(shape: _Shape) -> Config:
    rows, warps, registers = {8: (16, 8, None), 4: (32, 8, 255), 2: (64, 4, 255)}[shape.dtype.itemsize]
    constants = shape.tile_constants | {"ROWS": max(16, rows // 2) if shape.heavy else rows}
    arguments = (shape.dtype,) * 12 + (32, 400, 20, 1600, 40, 0, 400)
    return Config(tile._class_attention_bwd_kernel, arguments, constants, 8 if shape.heavy else warps, 1, registers)


@functools.cache
def _stream(shape: _Shape, which: str) -> Config:
    dtype, statistics = shape.dtype, shape.statistics
    kernel, tensors = {
        "fwd": (stream._class_attention_stream_fwd_kernel, (dtype, dtype, statistics)),
        "queries bwd": (
            stream._class_attention_stream_queries_bwd_kernel,
            (dtype, dtype, dtype, statistics, statistics, dtype),
        ),
        "keys bwd": (
            stream._class_attention_stream_keys_bwd_kernel,
            (dtype, dtype, statistics, statistics, dtype),
        ),
    }[which]
    rows, stages = {8: (32, 1), 4: (32, 1), 2: (64, 2)}[dtype.itemsize]
    if which == "keys bwd" and dtype.itemsize > 2:
        rows //= 2  # two sums per row
    constants = shape.constants | {"TILE": rows}
    return Config(kernel, (*tensors, 171), constants, num_warps=4, num_stages=stages, max_registers=255)


def _configs(shape: _Shape) -> dict[str, Config]:
    name = f"{shape.dtype} {shape.channels}/{shape.heads}"
    return {
        f"fwd {name}": _fwd(shape, True),
        f"sum fwd {name}": _fwd(shape, False),
        f"bwd {name}": _bwd(shape),
        **{f"stream {which} {name}": _stream(shape, which) for which in ("fwd", "queries bwd", "keys bwd")},
    }


CONFIGS: dict[str, Config] = {}
for _dtype in LANGUAGE_DTYPE:
    CONFIGS |= _configs(_Shape(_dtype, 128, 4, 384, EPS))
for _channels in (64, 256):
    CONFIGS |= _configs(_Shape(torch.bfloat16, _channels, 4, 3 * _channels, EPS))


class _Attention(NamedTuple):
    """Arguments of the attention: contiguous, masks in their dtype."""

    query_text: Tensor  # [B, K, C]
    key_text: Tensor  # [B, K, C]
    query_weight: Tensor  # [C, C]
    key_weight: Tensor  # [C, C]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]
    drop: Tensor | None  # [B, h, w]

    @property
    def in_weight(self) -> Tensor:
        """Of query, key and value: [3 C, C]."""
        return torch.cat((self.query_weight, self.key_weight, self.value_weight))


class _Call(NamedTuple):
    """The raw op's arguments behind ``x``, sorted."""

    shape: _Shape
    attention: _Attention
    mlp: list[Tensor]
    drop_mlp: Tensor | None

    @classmethod
    def of(cls, query_text: Tensor, *arguments: Any) -> _Call:
        *tensors, drop_attention, drop_mlp, num_heads, eps = arguments
        tensors = [t.contiguous() for t in (query_text, *tensors)]
        shape = _Shape(query_text.dtype, query_text.shape[-1], num_heads, tensors[8].shape[0], eps)
        masks = [None if m is None else m.to(query_text.dtype).contiguous() for m in (drop_attention, drop_mlp)]
        return cls(shape, _Attention(*tensors[:8], masks[0]), tensors[8:], masks[1])


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result [B, K, h, w, C] of :func:`errseg.ops.class_attention`, and in training the pooled map."""
    *arguments, training = arguments
    call = _Call.of(*arguments)
    batch, num_classes, height, width, channels = x.shape
    pooled = x.new_empty((batch, num_classes, height // 2, width // 2, channels))
    if not pooled.numel():
        out = torch.empty_like(pooled)
    elif num_classes <= _fwd(call.shape, True).constants["ROWS"]:
        out = _tile_forward(call, x.contiguous(), pooled, pool=True)
    else:
        pooled.copy_(_cells(x).mean((3, 5)))
        out = _stream_sum(call, pooled)
        change = gated_mlp.forward(out, *call.mlp, call.shape.eps).clamp_(0, 6)
        out += _masked(change, call.drop_mlp)
    return out, pooled if training else x.new_empty(0)


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the differentiable arguments where ``needed`` asks for them."""
    *arguments, pooled, needed = arguments
    if not grad.numel():
        return [t.new_zeros(t.shape) for t in (x, *arguments[:14])]
    call = _Call.of(*arguments)
    grad = grad.contiguous()
    if pooled.shape[1] <= _fwd(call.shape, False).constants["ROWS"]:
        u = _tile_forward(call, pooled, pooled, pool=False)
    else:
        u = _stream_sum(call, pooled)
    change = gated_mlp.forward(u, *call.mlp, call.shape.eps)
    change_grad = torch.ops.aten.hardtanh_backward(_masked(grad, call.drop_mlp), change, 0.0, 6.0)
    wants_attention = any(needed[:9])
    flags = [wants_attention, *needed[9:]]
    u_grad, *mlp_grads = gated_mlp.backward(change_grad, u, *call.mlp, call.shape.eps, flags)
    del u, change, change_grad
    if not wants_attention:
        return [x.new_empty(0)] * 9 + mlp_grads
    u_grad += grad
    sums = _Sums(call, pooled.shape[0], needed)
    in_a_tile = pooled.shape[1] <= _bwd(call.shape).constants["ROWS"]
    x_grad = (_tile_backward if in_a_tile else _stream_backward)(call, u_grad, x, pooled, sums, needed[0])
    return [x_grad, *(g.to(x.dtype, copy=True) for g in sums.gradients()), *mlp_grads]


def _tile_forward(call: _Call, source: Tensor, pooled: Tensor, *, pool: bool) -> Tensor:
    """From ``x`` the result and the pooled map; from the pooled map its sum with the attention."""
    batch, num_classes, height, width, _ = pooled.shape
    config, out = _fwd(call.shape, pool), torch.empty_like(pooled)
    *attention, drop_attention = call.attention
    tensors = source, *attention, *call.mlp, drop_attention, call.drop_mlp, pooled, out
    grid = (batch * triton.cdiv(height * width, config.constants["ROWS"] // num_classes),)
    config.launch(grid, *tensors, num_classes, height * width, width, *_sides(source))
    return out


def _tile_backward(call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, wants_x: bool) -> Tensor:
    """The gradient of ``x``, and its share of the sums, from that of the sum of pooled map and attention."""
    batch, num_classes, height, width, channels = pooled.shape
    x_grad = _empty_gradient(x, wants_x)
    config = _bwd(call.shape)
    query_text, key_text, *weights = call.attention[:7]
    drop = call.attention.drop
    row_bytes = 6 * channels * x.element_size()
    for images, first, pixels in _parts(batch, height * width, num_classes * row_bytes):
        count = images.stop - images.start
        operands = x.new_empty((count, pixels, num_classes, 6, channels))
        per_image = (t if t is None else t[images] for t in (grad, pooled, query_text, key_text))
        grid = (count * triton.cdiv(pixels, config.constants["ROWS"] // num_classes),)
        config.launch(
            grid,
            *per_image,
            *weights,
            None if drop is None else drop[images],
            operands,
            x_grad[images] if wants_x else None,
            *(num_classes, height * width, width, *_sides(x), first, pixels),
        )
        z, branch, mixture = operands.flatten(0, 2)[:, :3].unbind(1)
        sums.add(images, z, branch, mixture, operands[..., 3:, :])
    return x_grad


class _Heads(NamedTuple):
    """Some pixels of an image, one after the other, with all of their classes."""

    z: Tensor  # [N, K, C]
    mean: Tensor
    inverse: Tensor
    heads: Tensor  # [N, K, 3, C]: query, key and value
    mixture: Tensor  # [N, K, C]
    log_sums: Tensor  # [N, heads, K]

    @classmethod
    def of(cls, call: _Call, image: int, rows: Tensor, in_weight: Tensor) -> _Heads:
        num_pixels, num_classes, channels = rows.shape
        z, mean, inverse = torch.native_layer_norm(rows, [channels], None, None, call.shape.eps)
        text = call.attention.query_text[image], call.attention.key_text[image]
        added = torch.stack((*text, call.attention.value_bias.expand_as(text[0])), 1)  # [K, 3, C]
        heads = (z.flatten(0, 1) @ in_weight.T).view(num_pixels, *added.shape).add_(added)
        mixture = torch.empty_like(z)
        log_sums = z.new_empty((num_pixels, call.shape.heads, num_classes), dtype=call.shape.statistics)
        _launch_stream(call, "fwd", rows, heads, mixture, log_sums)
        return cls(z, mean, inverse, heads, mixture, log_sums)


def _launch_stream(call: _Call, which: str, rows: Tensor, *tensors: Tensor) -> None:
    config, (num_pixels, num_classes, _) = _stream(call.shape, which), rows.shape
    grid = num_pixels * triton.cdiv(num_classes, config.constants["TILE"]), call.shape.heads
    config.launch(grid, *tensors, num_classes)


def _stream_sum(call: _Call, pooled: Tensor) -> Tensor:
    """The pooled map and its attention."""
    u, in_weight = torch.empty_like(pooled), call.attention.in_weight
    for image, pixels, rows in _rows(pooled):
        heads = _Heads.of(call, image, rows, in_weight)
        change = torch.nn.functional.linear(heads.mixture, call.attention.out_weight, call.attention.out_bias)
        u[image].flatten(1, 2)[:, pixels] = (rows + _masked_rows(change, call, image, pixels)).transpose(0, 1)
    return u


def _stream_backward(call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, wants_x: bool) -> Tensor:
    """As :func:`_tile_backward`, for any number of classes."""
    in_weight = call.attention.in_weight
    pooled_grad = torch.empty_like(pooled) if wants_x else None
    for image, pixels, rows in _rows(pooled):
        heads = _Heads.of(call, image, rows, in_weight)
        rows_grad = grad[image].flatten(1, 2)[:, pixels].transpose(0, 1).contiguous()
        branch = _masked_rows(rows_grad, call, image, pixels)
        mixture_grad = branch @ call.attention.out_weight
        deltas, gradients = torch.empty_like(heads.log_sums), torch.empty_like(heads.heads)
        shared = heads.heads, heads.mixture, mixture_grad, heads.log_sums, deltas, gradients
        _launch_stream(call, "queries bwd", rows, *shared)
        _launch_stream(call, "keys bwd", rows, heads.heads, mixture_grad, heads.log_sums, deltas, gradients)
        z, branch, mixture = (t.flatten(0, 1) for t in (heads.z, branch, heads.mixture))
        sums.add(slice(image, image + 1), z, branch, mixture, gradients[None])
        if pooled_grad is not None:
            z_grad = (gradients.view(-1, in_weight.shape[0]) @ in_weight).view_as(rows)
            z_grad = torch.ops.aten.native_layer_norm_backward(
                z_grad, rows, rows.shape[2:], heads.mean, heads.inverse, None, None, [True, False, False]
            )[0]
            pooled_grad[image].flatten(1, 2)[:, pixels] = (rows_grad + z_grad).transpose(0, 1)
    x_grad = _empty_gradient(x, wants_x)
    if pooled_grad is not None:
        _cells(x_grad).copy_((pooled_grad / 4)[:, :, :, None, :, None])
    return x_grad


class _Sums:
    """Sums over all pixels, in float32 or better and in a fixed order; unwanted ones are empty."""

    def __init__(self, call: _Call, batch: int, needed: Sequence[bool]) -> None:
        text, channels = call.attention.query_text, call.shape.channels
        self.dtype = call.shape.statistics
        self.wants_heads = any((needed[1], needed[2], needed[6]))  # the texts and the bias of the values
        self.wants_in, self.wants_out, self.wants_bias = any(needed[3:6]), needed[7], needed[8]

        def zeros(wanted: bool, *shape: int) -> Tensor:
            return text.new_zeros(shape if wanted else 0, dtype=self.dtype)

        self.heads = zeros(self.wants_heads, *text.shape[:2], 3, channels)
        self.in_weight = zeros(self.wants_in, 3 * channels, channels)
        self.out_weight = zeros(self.wants_out, channels, channels)
        self.out_bias = zeros(self.wants_bias, channels)

    def add(self, images: slice, z: Tensor, branch: Tensor, mixture: Tensor, gradients: Tensor) -> None:
        """The share of some pixels: [N, C] three times, [images, pixels, K, 3, C]."""
        if self.wants_heads:
            self.heads[images] += gradients.sum(1, dtype=self.dtype)
        if self.wants_in:
            _add_product(self.in_weight, gradients.flatten(0, 2).flatten(1), z)
        if self.wants_out:
            _add_product(self.out_weight, branch, mixture)
        if self.wants_bias:
            self.out_bias += branch.sum(0, dtype=self.dtype)

    def gradients(self) -> list[Tensor]:
        """Of the texts, the four weights and two biases, in the order of the arguments."""
        empty = self.heads.new_empty(0)
        query, key, value = self.heads.unbind(2) if self.wants_heads else (empty,) * 3
        weights = self.in_weight.chunk(3) if self.wants_in else (empty,) * 3
        value_bias = value.sum((0, 1)) if self.wants_heads else empty
        return [query, key, *weights, value_bias, self.out_weight, self.out_bias]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, summed in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:  # interpreted
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def _sides(x: Tensor) -> tuple[int, int]:
    """Pixels of a map, and of its lines."""
    return x.shape[2] * x.shape[3], x.shape[3]


def _cells(x: Tensor) -> Tensor:
    """The 2 x 2 pixels of each pooled one: [B, K, h, 2, w, 2, C]."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * height, : 2 * width].unflatten(3, (width, 2)).unflatten(2, (height, 2))


def _empty_gradient(x: Tensor, wanted: bool) -> Tensor:
    """Of ``x``; zero where an odd last row or column is left out."""
    if not wanted:
        return x.new_empty(0)
    odd = x.shape[2] % 2 or x.shape[3] % 2
    return x.new_zeros(x.shape) if odd else x.new_empty(x.shape)


def _parts(batch: int, num_pixels: int, pixel_bytes: int) -> Iterator[tuple[slice, int, int]]:
    """Images, first pixel and number of pixels of slabs: several images, or a part of one."""
    pixels = max(1, SLAB_BYTES // pixel_bytes)
    images = max(1, pixels // num_pixels)
    for image in range(0, batch, images):
        for first in range(0, num_pixels, pixels):
            yield slice(image, min(image + images, batch)), first, min(pixels, num_pixels - first)


def _rows(pooled: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Slabs of a pooled map pixel by pixel, with image and pixels: [N, K, C]."""
    batch, num_classes, height, width, channels = pooled.shape
    # Input, z, its gradient, gradient of the sum, branch, mixture and its gradient, heads and their gradients.
    pixel_bytes = num_classes * 13 * channels * pooled.element_size()
    pixels = max(1, SLAB_BYTES // pixel_bytes)
    for image in range(batch):
        for first in range(0, height * width, pixels):
            part = slice(first, min(first + pixels, height * width))
            yield image, part, pooled[image].flatten(1, 2)[:, part].transpose(0, 1).contiguous()


def _masked(branch: Tensor, mask: Tensor | None) -> Tensor:
    return branch if mask is None else branch * mask[:, None, :, :, None]


def _masked_rows(branch: Tensor, call: _Call, image: int, pixels: slice) -> Tensor:
    drop = call.attention.drop
    return branch if drop is None else branch * drop[image].flatten()[pixels, None, None]
