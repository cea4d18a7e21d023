"""Class attention: the library's kernels, and products of cuBLAS.

Forward is one launch while the classes of a pixel fit into the rows of a block. With more of them the products with
the weights of the attention are left to cuBLAS, some pixels at a time, and a launch makes all the rest.

Backward, from the pooled map, goes slab by slab of pixels: its launches write what the gradients of the weights are
products of, at most ``SLAB_BYTES`` at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errseg.ops.class_slabs import Attention, AttentionSums, Order, Streamed, cells, empty_gradient, spread
from errseg.ops.cuda.arguments import ready, why_not
from errseg.ops.slabs import add_product, add_sum, parts

SAVED = ("pooled",)
SHAPE_ONLY = ("x",)
SLAB_BYTES = 256 << 20
ORDER = Order(query=2, key=0, value=1)

kernels: Any = torch.ops.errseg


def fake_saved(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The pooled map."""
    return (x.new_empty(_pooled_shape(x)),)


def _pooled_shape(x: Tensor) -> tuple[int, ...]:
    batch, num_classes, height, width, channels = x.shape
    return batch, num_classes, height // 2, width // 2, channels


def can_run(x: Tensor, *rest: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    num_heads, hidden = rest[-2], rest[8].shape[0]
    if reason := why_not(x, rest[:-4], num_heads):
        return reason
    if hidden % 8 or not hidden:
        return f"hidden units in multiples of 8, got {hidden}"
    rows = x.shape[:4].numel()  # they are counted in 32 bits
    return None if rows < 2**29 else f"less than 2**29 tokens, got {rows}"


class _Call(NamedTuple):
    """The raw op's arguments behind ``x``, ready for the kernels."""

    attention: Attention
    mlp: list[Tensor]
    drop_mlp: Tensor | None  # [B, h, w]
    num_heads: int
    eps: float

    @classmethod
    def of(cls, *arguments: Any) -> _Call:
        *tensors, drop_attention, drop_mlp, num_heads, eps = arguments
        tensors = [ready(t) for t in tensors]
        masks = [None if m is None else ready(m.to(tensors[0].dtype)) for m in (drop_attention, drop_mlp)]
        return cls(Attention._make((*tensors[:8], masks[0])), tensors[8:], masks[1], num_heads, eps)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Weights, masks, heads and eps."""
        *weights, drop = self.attention
        return [*weights, *self.mlp], drop, self.drop_mlp, self.num_heads, self.eps

    @property
    def hidden(self) -> int:
        return self.mlp[0].shape[0]

    @property
    def streamed(self) -> Streamed:
        """The attention with too many classes for a block."""

        def attend(heads: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.class_attention_cuda_stream_fwd(heads, self.num_heads)

        def attend_bwd(heads: Tensor, mixture: Tensor, log_sums: Tensor, mixture_grad: Tensor) -> Tensor:
            return kernels.class_attention_cuda_stream_bwd(heads, mixture, mixture_grad, log_sums)

        return Streamed(self.attention, self.eps, ORDER, SLAB_BYTES, attend, attend_bwd)

    def fits(self, num_classes: int) -> bool:
        """Whether a block can hold a pixel with all of its classes."""
        most = kernels.class_attention_cuda_most_classes(self.attention.query_text, self.num_heads, self.hidden)
        return num_classes <= most


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result [B, K, h, w, C] and, in training, the pooled map."""
    call, training, shape = _Call.of(*arguments[:-1]), arguments[-1], _pooled_shape(x)
    if math.prod(shape) and call.fits(x.shape[1]):
        return kernels.class_attention_cuda_fwd(ready(x), *call.arguments, training)
    pooled = x.new_empty(shape)
    if not pooled.numel():
        return torch.empty_like(pooled), pooled if training else x.new_empty(0)
    pooled.copy_(cells(x).mean((3, 5)))
    sums = call.streamed.sum(pooled).flatten(0, 3)
    out = kernels.class_attention_cuda_mlp_fwd(sums, call.mlp, _by_row(call.drop_mlp, pooled), call.eps)
    return out.view_as(pooled), pooled if training else x.new_empty(0)


def backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the differentiable arguments where ``needed`` asks for them.

    Transient beside the slabs: with many classes the sum of map and attention and its gradient, each as large as the
    pooled map.
    """
    pooled, needed = arguments[-2:]
    if not grad.numel():
        return [t.new_zeros(t.shape) for t in (x, *arguments[:14])]
    call, grad = _Call.of(*arguments[:-2]), ready(grad)
    sums = _Sums(call, needed)
    if call.fits(pooled.shape[1]):
        x_grad = _tile_backward(call, grad, x, pooled, sums, needed)
    else:
        x_grad = _streamed_backward(call, grad, x, pooled, sums, needed)
    return [x_grad, *(g.to(x.dtype, copy=True) for g in sums.gradients())]


def _tile_backward(call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, needed: Sequence[bool]) -> Tensor:
    """The gradient of ``x``, and sums of the others."""
    num_classes, area = pooled.shape[1], pooled.shape[2:4].numel()
    x_grad, transposed = empty_gradient(x, needed[0]), ready(call.attention.out_weight.T)
    pixel_bytes = num_classes * (9 * pooled.shape[-1] + 3 * call.hidden) * x.element_size()
    for images, first, pixels in parts(pooled.shape[0], area, pixel_bytes, SLAB_BYTES):
        part = images.start * area + first, pixels * (images.stop - images.start)
        *operands, sum_grad = kernels.class_attention_cuda_mlp_bwd(grad, pooled, *call.arguments, *part)
        sums.add_mlp(*operands)
        del operands
        if any(needed[:9]):
            into = x_grad if needed[0] else None
            z, branch, mixture, heads_grad = kernels.class_attention_cuda_attention_bwd(
                *(sum_grad, pooled, *call.arguments, *part, transposed, into, x.shape[2], x.shape[3])
            )
            sums.attention.add(images, z, branch if branch.numel() else sum_grad, mixture, heads_grad)
    return x_grad


def _streamed_backward(
    call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, needed: Sequence[bool]
) -> Tensor:
    """As :func:`_tile_backward`, for any number of classes."""
    u, u_grad = call.streamed.sum(pooled).flatten(0, 3), torch.empty_like(pooled)
    drop_mlp = _by_row(call.drop_mlp, pooled)
    slab = max(1, SLAB_BYTES // ((3 * pooled.shape[-1] + 3 * call.hidden) * x.element_size()))
    for start in range(0, len(u), slab):
        part = slice(start, start + slab)
        mask = None if drop_mlp is None else ready(drop_mlp[part])
        *operands, sum_grad = kernels.class_attention_cuda_mlp_rows_bwd(
            ready(grad.flatten(0, 3)[part]), ready(u[part]), call.mlp, mask, call.eps
        )
        sums.add_mlp(*operands)
        u_grad.view(-1, u.shape[-1])[part] = sum_grad
    if not any(needed[:9]):
        return x.new_empty(0)
    call.streamed.add_gradients(u_grad, pooled, sums.attention, needed[0])
    return spread(u_grad, x, needed[0])


class _Sums:
    """Sums over all pixels, in float32 and in a fixed order; unwanted ones are empty."""

    def __init__(self, call: _Call, needed: Sequence[bool]) -> None:
        text, hidden = call.attention.query_text, call.hidden
        channels = text.shape[-1]

        def zeros(wanted: bool, *shape: int) -> Tensor:
            return text.new_zeros(shape if wanted else 0, dtype=torch.float32)

        self.attention = AttentionSums(text, needed, ORDER)
        self.units_weight = zeros(needed[9] or needed[11], 2 * hidden, channels)
        self.units_bias = zeros(needed[10] or needed[12], 2 * hidden)
        self.mlp_out_weight, self.mlp_out_bias = zeros(needed[13], channels, hidden), zeros(needed[14], channels)

    def add_mlp(self, z: Tensor, branch: Tensor, units: Tensor, units_grad: Tensor) -> None:
        """The share of some rows: [N, C] twice, [N, M], [N, 2 M]."""
        add_product(self.units_weight, units_grad, z)
        add_sum(self.units_bias, units_grad)
        add_product(self.mlp_out_weight, branch, units)
        add_sum(self.mlp_out_bias, branch)

    def gradients(self) -> list[Tensor]:
        """Of the arguments behind ``x``, in their order."""
        empty = self.units_weight.new_empty(0)
        gate_weight, unit_weight = self.units_weight.chunk(2) if self.units_weight.numel() else (empty,) * 2
        gate_bias, unit_bias = self.units_bias.chunk(2) if self.units_bias.numel() else (empty,) * 2
        of_mlp = gate_weight, gate_bias, unit_weight, unit_bias, self.mlp_out_weight, self.mlp_out_bias
        return [*self.attention.gradients(), *of_mlp]


def _by_row(mask: Tensor | None, pooled: Tensor) -> Tensor | None:
    """[B, h, w] as one number for each row of a pooled map."""
    return None if mask is None else ready(mask[:, None].expand(pooled.shape[:4]).flatten())
