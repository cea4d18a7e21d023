"""Class attention around its kernels, slab by slab of pixels: shared by backends that leave products to the BLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from errseg.ops.slabs import add_product, add_sum, of_pixels, rows


class Order(NamedTuple):
    """Where the arrays of a head lie in [.., 3, C]."""

    query: int
    key: int
    value: int

    def sorted(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three in this order."""
        return [tensor for _, tensor in sorted(zip(self, (query, key, value), strict=True), key=lambda pair: pair[0])]


class Attention(NamedTuple):
    """Arguments of the attention, ready for kernels."""

    query_text: Tensor  # [B, K, C]
    key_text: Tensor  # [B, K, C]
    query_weight: Tensor  # [C, C]
    key_weight: Tensor  # [C, C]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]
    drop: Tensor | None  # [B, h, w]


class AttentionSums:
    """Gradients summed over all pixels, in float32 or better and in a fixed order; unwanted ones are empty."""

    def __init__(self, text: Tensor, needed: Sequence[bool], order: Order) -> None:
        channels, dtype = text.shape[-1], torch.promote_types(text.dtype, torch.float32)
        self.order = order

        def zeros(wanted: bool, *shape: int) -> Tensor:
            return text.new_zeros(shape if wanted else 0, dtype=dtype)

        self.heads = zeros(any((needed[1], needed[2], needed[6])), *text.shape[:2], 3, channels)
        self.in_weight = zeros(any(needed[3:6]), 3 * channels, channels)
        self.out_weight, self.out_bias = zeros(needed[7], channels, channels), zeros(needed[8], channels)

    def add(self, images: slice, z: Tensor, branch: Tensor, mixture: Tensor, heads_grad: Tensor) -> None:
        """The share of some pixels of ``images``: [N, C] three times, [N, 3, C]."""
        if self.heads.numel():
            of_image = heads_grad.view(images.stop - images.start, -1, *self.heads.shape[1:])
            self.heads[images] += of_image.sum(1, dtype=self.heads.dtype)
        add_product(self.in_weight, heads_grad.view(len(z), -1), z)
        add_product(self.out_weight, branch, mixture)
        add_sum(self.out_bias, branch)

    def gradients(self) -> list[Tensor]:
        """Of the texts, the four weights and two biases, in the order of the arguments."""
        empty = self.heads.new_empty(0)
        texts = self.heads.unbind(2) if self.heads.numel() else (empty,) * 3
        weights = self.in_weight.chunk(3) if self.in_weight.numel() else (empty,) * 3
        value_bias = texts[self.order.value].sum((0, 1)) if self.heads.numel() else empty
        query, key, _ = self.order
        return [texts[query], texts[key], *(weights[i] for i in self.order), value_bias, self.out_weight, self.out_bias]


class _Heads(NamedTuple):
    """Some pixels of an image, one after the other, with all of their classes."""

    z: Tensor  # [N, K, C]
    mean: Tensor
    inverse: Tensor
    heads: Tensor  # [N, K, 3, C]
    mixture: Tensor  # [N, K, C]
    log_sums: Tensor  # [N, heads, K]


@dataclass(frozen=True)
class Streamed:
    """Attention among any number of classes: products of the BLAS around a kernel's running softmax."""

    attention: Attention
    eps: float
    order: Order
    slab_bytes: int
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]  # arrays of the heads to mixture and log sums
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # the three and the mixture's gradient to the arrays'

    def _in_weight(self) -> Tensor:
        """[3 C, C]."""
        a = self.attention
        return torch.cat(self.order.sorted(a.query_weight, a.key_weight, a.value_weight))

    def _rows(self, pooled: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        # Input, z, its gradient, gradient of the sum, branch, mixture and its gradient, heads and their gradients.
        return rows(pooled, 13 * pooled.shape[1] * pooled.shape[-1] * pooled.element_size(), self.slab_bytes)

    def _heads(self, image: int, x: Tensor, in_weight: Tensor) -> _Heads:
        z, mean, inverse = torch.native_layer_norm(x, [x.shape[-1]], None, None, self.eps)
        query, key = self.attention.query_text[image], self.attention.key_text[image]
        added = torch.stack(self.order.sorted(query, key, self.attention.value_bias.expand_as(key)), 1)  # [K, 3, C]
        heads = (z.flatten(0, 1) @ in_weight.T).view(len(x), *added.shape).add_(added)
        return _Heads(z, mean, inverse, heads, *self.forward(heads))

    def _masked(self, branch: Tensor, image: int, pixels: slice) -> Tensor:
        drop = self.attention.drop
        return branch if drop is None else branch * drop[image].flatten()[pixels, None, None]

    def sum(self, pooled: Tensor) -> Tensor:
        """The pooled map [B, K, h, w, C] and its attention."""
        sums, in_weight = torch.empty_like(pooled), self._in_weight()
        for image, pixels, x in self._rows(pooled):
            mixture = self._heads(image, x, in_weight).mixture
            change = torch.nn.functional.linear(mixture, self.attention.out_weight, self.attention.out_bias)
            of_pixels(sums, image, pixels).copy_((x + self._masked(change, image, pixels)).transpose(0, 1))
        return sums

    def add_gradients(self, sum_grad: Tensor, pooled: Tensor, sums: AttentionSums, wants_pooled: bool) -> None:
        """From the gradient of that sum, which becomes the pooled map's where it is wanted."""
        in_weight = self._in_weight()
        for image, pixels, x in self._rows(pooled):
            z, mean, inverse, heads, mixture, log_sums = self._heads(image, x, in_weight)
            grad = of_pixels(sum_grad, image, pixels).transpose(0, 1).contiguous()
            branch = self._masked(grad, image, pixels)
            heads_grad = self.backward(heads, mixture, log_sums, branch @ self.attention.out_weight)
            of_rows = z.flatten(0, 1), branch.flatten(0, 1), mixture.flatten(0, 1)
            sums.add(slice(image, image + 1), *of_rows, heads_grad)
            if wants_pooled:
                z_grad = (heads_grad.view(-1, len(in_weight)) @ in_weight).view_as(x)
                statistics = mean, inverse, None, None, [True, False, False]
                z_grad = torch.ops.aten.native_layer_norm_backward(z_grad, x, x.shape[2:], *statistics)[0]
                of_pixels(sum_grad, image, pixels).copy_((grad + z_grad).transpose(0, 1))


def cells(x: Tensor) -> Tensor:
    """The 2 x 2 pixels of each pooled one: [B, K, h, 2, w, 2, C]."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * height, : 2 * width].unflatten(3, (width, 2)).unflatten(2, (height, 2))


def empty_gradient(x: Tensor, wanted: bool) -> Tensor:
    """Of ``x``; zero where an odd last row or column is left out."""
    if not wanted:
        return x.new_empty(0)
    odd = x.shape[2] % 2 or x.shape[3] % 2
    return x.new_zeros(x.shape) if odd else x.new_empty(x.shape)


def spread(pooled_grad: Tensor, x: Tensor, wanted: bool) -> Tensor:
    """The gradient of ``x`` from that of its pooled map."""
    x_grad = empty_gradient(x, wanted)
    if wanted:
        cells(x_grad).copy_((pooled_grad / 4)[:, :, :, None, :, None])
    return x_grad
