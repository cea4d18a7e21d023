"""Class attention: the library's kernels, and products of cuBLAS.

Forward is one launch while the classes of a pixel fit into the rows of a block. With more of them the products with
the weights of the attention are left to cuBLAS, some pixels at a time, and a launch makes all the rest.

Backward, from the pooled map, goes slab by slab of pixels: its launches write what the gradients of the weights are
products of, at most ``SLAB_BYTES`` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAVED = ("pooled",)
SHAPE_ONLY = ("x",)
MAX_CHANNELS, MAX_HEAD_WIDTH = 256, 64
DTYPES = torch.bfloat16, torch.float16
SLAB_BYTES = 256 << 20
KEY, VALUE, QUERY = range(3)  # arrays of a head

kernels: Any = torch.ops.errseg


def fake_saved(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The pooled map."""
    return (_empty_pooled(x),)


def _empty_pooled(x: Tensor) -> Tensor:
    batch, num_classes, height, width, channels = x.shape
    return x.new_empty((batch, num_classes, height // 2, width // 2, channels))


def can_run(x: Tensor, *rest: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    channels, num_heads, hidden = x.shape[-1], rest[-2], rest[8].shape[0]
    width = channels // num_heads
    for tensor in (x, *rest[:-4]):
        if x.dtype not in DTYPES or tensor.dtype != x.dtype:
            return f"all of bfloat16 or all of float16, got {tensor.dtype}"
    if channels % 16 or channels > MAX_CHANNELS:
        return f"channels in multiples of 16, up to {MAX_CHANNELS}, got {channels}"
    if width % 8 or width > MAX_HEAD_WIDTH:
        return f"heads of channels in multiples of 8, up to {MAX_HEAD_WIDTH}, got {width}"
    if hidden % 8 or not hidden:
        return f"hidden units in multiples of 8, got {hidden}"
    rows = x.shape[:4].numel()  # they are counted in 32 bits
    return None if rows < 2**29 else f"less than 2**29 tokens, got {rows}"


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to the widest access."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _Call(NamedTuple):
    """The raw op's arguments behind ``x``, ready for the kernels."""

    query_text: Tensor  # [B, K, C]
    key_text: Tensor  # [B, K, C]
    query_weight: Tensor  # [C, C]
    key_weight: Tensor  # [C, C]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]
    mlp: list[Tensor]
    drop_attention: Tensor | None  # [B, h, w]
    drop_mlp: Tensor | None  # [B, h, w]
    num_heads: int
    eps: float

    @classmethod
    def of(cls, *arguments: Any) -> _Call:
        *tensors, drop_attention, drop_mlp, num_heads, eps = arguments
        tensors = [_ready(t) for t in tensors]
        masks = [None if m is None else _ready(m.to(tensors[0].dtype)) for m in (drop_attention, drop_mlp)]
        fields: list[Any] = [*tensors[:8], tensors[8:], *masks, num_heads, eps]
        return cls(*fields)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Weights, masks, heads and eps."""
        return [*self[:8], *self.mlp], *self[9:]

    @property
    def hidden(self) -> int:
        return self.mlp[0].shape[0]

    @property
    def in_weight(self) -> Tensor:
        """Of key, value and query: [3 C, C]."""
        return torch.cat((self.key_weight, self.value_weight, self.query_weight))

    def fits(self, num_classes: int) -> bool:
        """Whether a block can hold a pixel with all of its classes."""
        most = kernels.class_attention_cuda_most_classes(self.query_text, self.num_heads, self.hidden)
        return num_classes <= most


def forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result [B, K, h, w, C] and, in training, the pooled map."""
    call, pooled, training = _Call.of(*arguments[:-1]), _empty_pooled(x), arguments[-1]
    if not pooled.numel():
        return torch.empty_like(pooled), pooled if training else x.new_empty(0)
    if call.fits(x.shape[1]):
        return kernels.class_attention_cuda_fwd(_ready(x), *call.arguments, training)
    pooled.copy_(_cells(x).mean((3, 5)))
    sums = _streamed_sum(call, pooled).flatten(0, 3)
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
    call, grad = _Call.of(*arguments[:-2]), _ready(grad)
    sums = _Sums(call, pooled.shape[0], needed)
    if call.fits(pooled.shape[1]):
        x_grad = _tile_backward(call, grad, x, pooled, sums, needed)
    else:
        x_grad = _streamed_backward(call, grad, x, pooled, sums, needed)
    return [x_grad, *(g.to(x.dtype, copy=True) for g in sums.gradients())]


def _tile_backward(call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, needed: Sequence[bool]) -> Tensor:
    """The gradient of ``x``, and sums of the others."""
    num_classes, area = pooled.shape[1], pooled.shape[2:4].numel()
    x_grad, transposed = _empty_gradient(x, needed[0]), _ready(call.out_weight.T)
    row_numbers = 9 * pooled.shape[-1] + 3 * call.hidden
    for images, first, pixels in _parts(pooled.shape[0], area, num_classes * row_numbers * x.element_size()):
        part = images.start * area + first, pixels * (images.stop - images.start)
        *operands, sum_grad = kernels.class_attention_cuda_mlp_bwd(grad, pooled, *call.arguments, *part)
        sums.add_mlp(*operands)
        del operands
        if any(needed[:9]):
            into = x_grad if needed[0] else None
            z, branch, mixture, heads_grad = kernels.class_attention_cuda_attention_bwd(
                *(sum_grad, pooled, *call.arguments, *part, transposed, into, x.shape[2], x.shape[3])
            )
            sums.add(images, num_classes, z, branch if branch.numel() else sum_grad, mixture, heads_grad)
    return x_grad


class _Streamed(NamedTuple):
    """Some pixels of an image, one after the other, with all of their classes."""

    z: Tensor  # [N, K, C]
    mean: Tensor
    inverse: Tensor
    heads: Tensor  # [N, K, 3, C]: key, value and query
    mixture: Tensor  # [N, K, C]
    log_sums: Tensor  # [N, heads, K]

    @classmethod
    def of(cls, call: _Call, image: int, rows: Tensor, in_weight: Tensor) -> _Streamed:
        z, mean, inverse = torch.native_layer_norm(rows, [rows.shape[-1]], None, None, call.eps)
        key, query = call.key_text[image], call.query_text[image]
        added = torch.stack((key, call.value_bias.expand_as(key), query), 1)  # [K, 3, C]
        heads = (z.flatten(0, 1) @ in_weight.T).view(len(rows), *added.shape).add_(added)
        mixture, log_sums = kernels.class_attention_cuda_stream_fwd(heads, call.num_heads)
        return cls(z, mean, inverse, heads, mixture, log_sums)


def _streamed_sum(call: _Call, pooled: Tensor) -> Tensor:
    """The pooled map and its attention."""
    sums, in_weight = torch.empty_like(pooled), call.in_weight
    for image, pixels, rows in _rows(pooled):
        streamed = _Streamed.of(call, image, rows, in_weight)
        change = torch.nn.functional.linear(streamed.mixture, call.out_weight, call.out_bias)
        sums[image].flatten(1, 2)[:, pixels] = (rows + _masked_rows(change, call, image, pixels)).transpose(0, 1)
    return sums


def _streamed_backward(
    call: _Call, grad: Tensor, x: Tensor, pooled: Tensor, sums: _Sums, needed: Sequence[bool]
) -> Tensor:
    """As :func:`_tile_backward`, for any number of classes."""
    u, u_grad = _streamed_sum(call, pooled).flatten(0, 3), torch.empty_like(pooled)
    drop_mlp = _by_row(call.drop_mlp, pooled)
    slab = max(1, SLAB_BYTES // ((3 * pooled.shape[-1] + 3 * call.hidden) * x.element_size()))
    for start in range(0, len(u), slab):
        part = slice(start, start + slab)
        mask = None if drop_mlp is None else _ready(drop_mlp[part])
        *operands, sum_grad = kernels.class_attention_cuda_mlp_rows_bwd(
            _ready(grad.flatten(0, 3)[part]), _ready(u[part]), call.mlp, mask, call.eps
        )
        sums.add_mlp(*operands)
        u_grad.view(-1, u.shape[-1])[part] = sum_grad
    if not any(needed[:9]):
        return x.new_empty(0)
    in_weight = call.in_weight
    for image, pixels, rows in _rows(pooled):
        streamed = _Streamed.of(call, image, rows, in_weight)
        rows_grad = u_grad[image].flatten(1, 2)[:, pixels].transpose(0, 1).contiguous()
        branch = _masked_rows(rows_grad, call, image, pixels)
        heads_grad = kernels.class_attention_cuda_stream_bwd(
            streamed.heads, streamed.mixture, branch @ call.out_weight, streamed.log_sums
        )
        z, branch, mixture = (t.flatten(0, 1) for t in (streamed.z, branch, streamed.mixture))
        sums.add(slice(image, image + 1), pooled.shape[1], z, branch, mixture, heads_grad)
        if needed[0]:
            z_grad = (heads_grad.view(-1, len(in_weight)) @ in_weight).view_as(rows)
            statistics = streamed.mean, streamed.inverse, None, None, [True, False, False]
            z_grad = torch.ops.aten.native_layer_norm_backward(z_grad, rows, rows.shape[2:], *statistics)[0]
            u_grad[image].flatten(1, 2)[:, pixels] = (rows_grad + z_grad).transpose(0, 1)
    x_grad = _empty_gradient(x, needed[0])
    if needed[0]:
        _cells(x_grad).copy_((u_grad / 4)[:, :, :, None, :, None])
    return x_grad


class _Sums:
    """Sums over all pixels, in float32 and in a fixed order; unwanted ones are empty."""

    def __init__(self, call: _Call, batch: int, needed: Sequence[bool]) -> None:
        text, hidden = call.query_text, call.hidden
        channels = text.shape[-1]
        self.wants_heads = any((needed[1], needed[2], needed[6]))  # the texts and the bias of the values

        def zeros(wanted: bool, *shape: int) -> Tensor:
            return text.new_zeros(shape if wanted else 0, dtype=torch.float32)

        self.heads = zeros(self.wants_heads, *text.shape[:2], 3, channels)
        self.in_weight = zeros(any(needed[3:6]), 3 * channels, channels)
        self.out_weight, self.out_bias = zeros(needed[7], channels, channels), zeros(needed[8], channels)
        self.units_weight = zeros(needed[9] or needed[11], 2 * hidden, channels)
        self.units_bias = zeros(needed[10] or needed[12], 2 * hidden)
        self.mlp_out_weight, self.mlp_out_bias = zeros(needed[13], channels, hidden), zeros(needed[14], channels)

    def add_mlp(self, z: Tensor, branch: Tensor, units: Tensor, units_grad: Tensor) -> None:
        """The share of some rows: [N, C] twice, [N, M], [N, 2 M]."""
        _add_product(self.units_weight, units_grad, z)
        _add_sum(self.units_bias, units_grad)
        _add_product(self.mlp_out_weight, branch, units)
        _add_sum(self.mlp_out_bias, branch)

    def add(
        self, images: slice, num_classes: int, z: Tensor, branch: Tensor, mixture: Tensor, heads_grad: Tensor
    ) -> None:
        """The share of some pixels of ``images``: [N, C] three times, [N, 3, C]."""
        if self.wants_heads:
            parts = heads_grad.view(images.stop - images.start, -1, num_classes, *self.heads.shape[2:])
            self.heads[images] += parts.sum(1, dtype=torch.float32)
        _add_product(self.in_weight, heads_grad.view(len(z), -1), z)
        _add_product(self.out_weight, branch, mixture)
        _add_sum(self.out_bias, branch)

    def gradients(self) -> list[Tensor]:
        """Of the arguments behind ``x``, in their order."""
        empty = self.heads.new_empty(0)
        texts = self.heads.unbind(2) if self.wants_heads else (empty,) * 3
        weights = self.in_weight.chunk(3) if self.in_weight.numel() else (empty,) * 3
        value_bias = texts[VALUE].sum((0, 1)) if self.wants_heads else empty
        gate_weight, unit_weight = self.units_weight.chunk(2) if self.units_weight.numel() else (empty,) * 2
        gate_bias, unit_bias = self.units_bias.chunk(2) if self.units_bias.numel() else (empty,) * 2
        return [
            *(texts[QUERY], texts[KEY], weights[QUERY], weights[KEY], weights[VALUE], value_bias),
            *(self.out_weight, self.out_bias, gate_weight, gate_bias, unit_weight, unit_bias),
            *(self.mlp_out_weight, self.mlp_out_bias),
        ]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, summed in float32; nothing where ``total`` is unwanted."""
    if not total.numel():
        return
    if left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:  # emulated
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def _add_sum(total: Tensor, rows: Tensor) -> None:
    if total.numel():
        total += rows.sum(0, dtype=total.dtype)


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
    pixels = max(1, SLAB_BYTES // (num_classes * 13 * channels * pooled.element_size()))
    for image in range(batch):
        for first in range(0, height * width, pixels):
            part = slice(first, min(first + pixels, height * width))
            yield image, part, pooled[image].flatten(1, 2)[:, part].transpose(0, 1).contiguous()


def _by_row(mask: Tensor | None, pooled: Tensor) -> Tensor | None:
    """[B, h, w] as one number for each row of a pooled map."""
    return None if mask is None else _ready(mask[:, None].expand(pooled.shape[:4]).flatten())


def _masked_rows(branch: Tensor, call: _Call, image: int, pixels: slice) -> Tensor:
    drop = call.drop_attention
    return branch if drop is None else branch * drop[image].flatten()[pixels, None, None]
