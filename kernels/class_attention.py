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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from errseg.kernels import _class_attention_stream as stream
from errseg.kernels import _class_attention_tile as tile
from errseg.kernels import gated_mlp
from errseg.kernels.common import LANGUAGE_DTYPE, Config, padded
from errseg.ops.class_slabs import Attention, AttentionSums, Order, Streamed, cells, empty_gradient, spread
from errseg.ops.slabs import parts

EPS = 1e-5  # of the published norms: what is checked ahead of time
SLAB_BYTES = 128 << 20
ORDER = Order(query=0, key=1, value=2)


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
            "HEAD": padded(width),
            "DTYPE": LANGUAGE_DTYPE[self.statistics],
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "ieee",
        }

    @property
    def tile_constants(self) -> dict[str, Any]:
        """Of the kernels that take rows of channels."""
        channels = padded(self.channels)
        whole = self.dtype.itemsize == 2 and not self.heavy
        return self.constants | {
            "EPS": self.eps,
            "CHANNELS": channels,
            "WHOLE": whole,
            "STEP": max(16, channels // 2) if whole else 16,
        }


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


class _Call(NamedTuple):
    """The raw op's arguments behind ``x``, sorted."""

    shape: _Shape
    attention: Attention
    mlp: list[Tensor]
    drop_mlp: Tensor | None

    @classmethod
    def of(cls, query_text: Tensor, *arguments: Any) -> _Call:
        *tensors, drop_attention, drop_mlp, num_heads, eps = arguments
        tensors = [t.contiguous() for t in (query_text, *tensors)]
        shape = _Shape(query_text.dtype, query_text.shape[-1], num_heads, tensors[8].shape[0], eps)
        masks = [None if m is None else m.to(query_text.dtype).contiguous() for m in (drop_attention, drop_mlp)]
        return cls(shape, Attention(*tensors[:8], masks[0]), tensors[8:], masks[1])

    @property
    def streamed(self) -> Streamed:
        """The attention with too many classes for a tile."""

        def attend(heads: Tensor) -> tuple[Tensor, Tensor]:
            num_pixels, num_classes, _, channels = heads.shape
            mixture = heads.new_empty((num_pixels, num_classes, channels))
            log_sums = heads.new_empty((num_pixels, self.shape.heads, num_classes), dtype=self.shape.statistics)
            launch("fwd", heads, mixture, log_sums)
            return mixture, log_sums

        def attend_bwd(heads: Tensor, mixture: Tensor, log_sums: Tensor, mixture_grad: Tensor) -> Tensor:
            deltas, heads_grad = torch.empty_like(log_sums), torch.empty_like(heads)
            launch("queries bwd", heads, mixture, mixture_grad, log_sums, deltas, heads_grad)
            launch("keys bwd", heads, mixture_grad, log_sums, deltas, heads_grad)
            return heads_grad

        def launch(which: str, heads: Tensor, *tensors: Tensor) -> None:
            config, (num_pixels, num_classes, *_) = _stream(self.shape, which), heads.shape
            grid = num_pixels * triton.cdiv(num_classes, config.constants["TILE"]), self.shape.heads
            config.launch(grid, heads, *tensors, num_classes)

        return Streamed(self.attention, self.shape.eps, ORDER, SLAB_BYTES, attend, attend_bwd)


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
        pooled.copy_(cells(x).mean((3, 5)))
        out = call.streamed.sum(pooled)
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
        u = call.streamed.sum(pooled)
    change = gated_mlp.forward(u, *call.mlp, call.shape.eps)
    change_grad = torch.ops.aten.hardtanh_backward(_masked(grad, call.drop_mlp), change, 0.0, 6.0)
    wants_attention = any(needed[:9])
    flags = [wants_attention, *needed[9:]]
    u_grad, *mlp_grads = gated_mlp.backward(change_grad, u, *call.mlp, call.shape.eps, flags)
    del u, change, change_grad
    if not wants_attention:
        return [x.new_empty(0)] * 9 + mlp_grads
    u_grad += grad
    sums = AttentionSums(call.attention.query_text, needed, ORDER)
    if pooled.shape[1] <= _bwd(call.shape).constants["ROWS"]:
        x_grad = _tile_backward(call, u_grad, x, pooled, sums, needed[0])
    else:
        call.streamed.add_gradients(u_grad, pooled, sums, needed[0])
        x_grad = spread(u_grad, x, needed[0])
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


def _tile_backward(call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: AttentionSums, wants_x: bool) -> Tensor:
    """The gradient of ``x``, and its share of the sums, from that of the sum of pooled map and attention."""
    batch, num_classes, height, width, channels = pooled.shape
    x_grad = empty_gradient(x, wants_x)
    config = _bwd(call.shape)
    query_text, key_text, *weights = call.attention[:7]
    drop = call.attention.drop
    pixel_bytes = num_classes * 6 * channels * x.element_size()
    for images, first, pixels in parts(batch, height * width, pixel_bytes, SLAB_BYTES):
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


def _sides(x: Tensor) -> tuple[int, int]:
    """Pixels of a map, and of its lines."""
    return x.shape[2] * x.shape[3], x.shape[3]


def _masked(branch: Tensor, mask: Tensor | None) -> Tensor:
    return branch if mask is None else branch * mask[:, None, :, :, None]
