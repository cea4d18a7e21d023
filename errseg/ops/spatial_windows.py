"""Spatial attention around its kernels, window by window: shared by backends that leave products to the BLAS.

Token t of a map is pixel t % r r of window t // r r, with windows of r x r counted over the whole map. An odd map ends
in windows that stick out; keys and values belong to whole windows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAVED = "mixture", "log_sums", "key", "value"


class Sizes(NamedTuple):
    """Of one call."""

    batch: int
    num_classes: int
    height: int
    width: int
    channels: int
    window: int  # r

    @classmethod
    def of(cls, x: Tensor, value_reduce_weight: Tensor) -> Sizes:
        batch, num_classes, height, width, channels = x.shape
        window = round((value_reduce_weight.shape[1] // channels) ** 0.5)
        return cls(batch, num_classes, height, width, channels, window)

    @property
    def maps(self) -> int:
        return self.batch * self.num_classes

    @property
    def num_keys(self) -> int:
        return (self.height // self.window) * (self.width // self.window)

    @property
    def windows(self) -> tuple[int, int]:
        """Down and across, those that stick out of an odd map included."""
        return -(-self.height // self.window), -(-self.width // self.window)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.windows) * self.window**2

    def whole_windows(self, tokens: Tensor) -> Tensor:
        """Tokens [B, K, T, C] of the windows that do not stick out, a view: [B, K, down, across, r r C]."""
        down, across = self.height // self.window, self.width // self.window
        return tokens.view(self.batch, self.num_classes, *self.windows, -1)[:, :, :down, :across]

    def pixels(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, C] as [B, H, W, C]."""
        down, across = self.windows
        r = self.window
        pixels = tokens.unflatten(1, (down, across, r, r)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return pixels[:, : self.height, : self.width].contiguous()


def fake_saved(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What the forward pass saves: the heads' mixture of values, log sums of the scores by token, keys and values."""
    return empty_saved(x, Sizes.of(x, rest[5]), num_heads=rest[-2])


def empty_saved(x: Tensor, sizes: Sizes, num_heads: int) -> tuple[Tensor, ...]:
    """Memory for what the forward pass saves."""
    statistics = torch.promote_types(x.dtype, torch.float32)
    log_sums = x.new_empty((*x.shape[:2], num_heads, sizes.num_tokens), dtype=statistics)
    key = x.new_empty((*x.shape[:2], sizes.num_keys, sizes.channels))
    return torch.empty_like(x, memory_format=torch.contiguous_format), log_sums, key, torch.empty_like(key)


def zero_gradients(*inputs: Tensor) -> list[Tensor]:
    """Of the differentiable arguments of a call without a pixel."""
    return [torch.zeros_like(t) for t in inputs]


class Handed(NamedTuple):
    """What the launches of the backward pass leave to products and sums."""

    z: Tensor  # [B, K, T, C]: normalised pixels
    query_grad: Tensor  # [B, K, T, C]
    key_grad: Tensor  # [B, K, N_kv, C]
    value_grad: Tensor  # [B, K, N_kv, C]
    windows: Tensor  # [B K N_kv, r r C]: whole ones of z
    reduced_key: Tensor  # [B K N_kv, 2C]: normalised
    reduced_key_grad: Tensor  # [B K N_kv, 2C]: of the rows before their norm
    reduced_value: Tensor  # [B K N_kv, C]
    reduced_value_grad: Tensor  # [B K N_kv, C]

    def gradients(self, sizes: Sizes, x_grad: Tensor, branch: Tensor, mixture: Tensor) -> list[Tensor]:
        """Of the differentiable arguments, in their order; ``branch`` is the gradient of the projected mixture."""
        branch = branch.flatten(0, 3)
        return [
            x_grad,
            sizes.pixels(self.query_grad.sum(1)),
            self.reduced_key_grad.unflatten(0, (sizes.batch, sizes.num_classes, -1)).sum(1),
            self.query_grad.flatten(0, 2).T @ self.z.flatten(0, 2),
            self.reduced_key_grad.T @ self.windows,
            self.key_grad.flatten(0, 2).T @ self.reduced_key,
            self.reduced_value_grad.T @ self.windows,
            self.reduced_value_grad.sum(0),
            self.value_grad.flatten(0, 2).T @ self.reduced_value,
            self.value_grad.sum((0, 1, 2)),
            branch.T @ mixture.flatten(0, 3),
            branch.sum(0),
        ]
