"""Spatial attention: the library's kernels around products of cuBLAS.

Forward, windows of normalised pixels become keys and values, a few maps at a time; one launch does all the rest.
Backward, two launches make the gradients of queries, keys and values, and what the products of the others need; see
``backward`` for the transient memory. Tokens, in the order of the windows, are those of csrc/spatial_attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errseg.ops.cuda.arguments import ready, why_not

SAVED = "mixture", "log_sums", "key", "value"
CHUNK_BYTES = 32 << 20  # of normalised windows: little beside the maps, much beside a launch

kernels: Any = torch.ops.errseg


class Sizes(NamedTuple):
    """Of one call."""

    batch: int
    num_classes: int
    height: int
    width: int
    channels: int
    window: int

    @classmethod
    def of(cls, x: Tensor, value_reduce_weight: Tensor) -> Sizes:
        batch, num_classes, height, width, channels = x.shape
        window = round((value_reduce_weight.shape[1] // channels) ** 0.5)
        return cls(batch, num_classes, height, width, channels, window)

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


def fake_saved(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The heads' mixture of values, log sums of the scores by token, keys and values."""
    return _empty_saved(x, Sizes.of(x, rest[5]), num_heads=rest[-2])


def _empty_saved(x: Tensor, sizes: Sizes, num_heads: int) -> tuple[Tensor, ...]:
    log_sums = x.new_empty((*x.shape[:2], num_heads, sizes.num_tokens), dtype=torch.float32)
    key = x.new_empty((*x.shape[:2], sizes.num_keys, sizes.channels))
    return torch.empty_like(x, memory_format=torch.contiguous_format), log_sums, key, torch.empty_like(key)


def can_run(x: Tensor, *rest: Any) -> str | None:
    """Why the kernels cannot take these arguments."""
    if reason := why_not(x, rest[:-3], num_heads=rest[-2]):
        return reason
    numbers = x.shape[2:].numel()  # offsets within a map are 32 bits wide
    return None if 4 * numbers < 2**31 else f"maps of less than 2**29 numbers, got {numbers}"


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
    x = ready(x)
    if not x.numel():
        saved = _empty_saved(x, sizes, num_heads)
        return torch.empty_like(x), *(t if training else t.new_empty(0) for t in saved)
    weights = key_reduce_weight, key_weight, value_reduce_weight, value_reduce_bias, value_weight, value_bias
    key, value = _keys_and_values(sizes, eps, x, ready(key_map), *weights)
    drop_path = None if drop_path is None else drop_path.to(x.dtype)
    inputs = ready(query_map), key, value, ready(query_weight), ready(out_weight), ready(out_bias), drop_path
    out, mixture, log_sums = kernels.spatial_attention_cuda_attend(x, *inputs, num_heads, sizes.window, eps, training)
    if not training:
        key, value = x.new_empty(0), x.new_empty(0)
    return out, mixture, log_sums, key, value


def _keys_and_values(
    sizes: Sizes,
    eps: float,
    x: Tensor,
    key_map: Tensor,
    key_reduce_weight: Tensor,
    key_weight: Tensor,
    value_reduce_weight: Tensor,
    value_reduce_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """[B, K, N_kv, C], some classes of an image at a time."""
    key = x.new_empty((*x.shape[:2], sizes.num_keys, sizes.channels))
    value = torch.empty_like(key)
    map_bytes = x.element_size() * sizes.num_keys * sizes.window**2 * sizes.channels
    classes = max(1, CHUNK_BYTES // map_bytes)
    value_reduce_bias = ready(value_reduce_bias)
    for image in range(sizes.batch):
        for start in range(0, sizes.num_classes, classes):
            part = image, slice(start, start + classes)
            windows = kernels.spatial_attention_cuda_windows(x[part], sizes.window, eps)  # [k N_kv, r r C]
            reduced = windows @ key_reduce_weight.T  # [k N_kv, 2C]
            kernels.spatial_attention_cuda_rows(reduced, key_map[image], eps, None)
            torch.mm(reduced, key_weight.T, out=key[part].flatten(0, 1))
            reduced = windows @ value_reduce_weight.T  # [k N_kv, C]
            kernels.spatial_attention_cuda_rows(reduced, value_reduce_bias, eps, None)
            torch.addmm(value_bias, reduced, value_weight.T, out=value[part].flatten(0, 1))
    return key, value


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
    keys and values X / 2; then, without queries and the mixture's, reduced windows and their gradients 3 X / 2, the
    pixels' gradient X, and the result X: 6 X. Drop path makes the gradient of the branch, X.
    """
    if not x.numel():
        inputs = x, query_map, key_map, query_weight, key_reduce_weight, key_weight, value_reduce_weight
        return [
            torch.zeros_like(t) for t in (*inputs, value_reduce_bias, value_weight, value_bias, out_weight, out_bias)
        ]
    sizes = Sizes.of(x, value_reduce_weight)
    x, grad = ready(x), ready(grad)
    branch = grad if drop_path is None else grad * drop_path[:, :, None, None, None].to(grad.dtype)
    z, query_grad, key_grad, value_grad = kernels.spatial_attention_cuda_attend_bwd(
        *(branch, x, ready(query_map), key, value, ready(query_weight), ready(out_weight.T), mixture, log_sums),
        *(sizes.window, eps),
    )
    # Whole windows only: a view of an even map.
    down, across = sizes.height // sizes.window, sizes.width // sizes.window
    windows = z.view(*x.shape[:2], *sizes.windows, -1)[:, :, :down, :across].reshape(-1, sizes.window**2 * x.shape[-1])
    reduced_key, value_rows = windows @ key_reduce_weight.T, windows @ value_reduce_weight.T
    reduced_key_grad = key_grad.flatten(0, 2) @ key_weight
    reduced_value_grad = value_grad.flatten(0, 2) @ value_weight
    kernels.spatial_attention_cuda_rows(reduced_key, ready(key_map), eps, reduced_key_grad)
    kernels.spatial_attention_cuda_rows(value_rows, ready(value_reduce_bias), eps, reduced_value_grad)

    z_grad = query_grad @ query_weight
    window_grads = z_grad.view(*x.shape[:2], *sizes.windows, -1)[:, :, :down, :across]
    if window_grads.is_contiguous():
        rows = window_grads.view(windows.shape)
        rows.addmm_(reduced_key_grad, key_reduce_weight).addmm_(reduced_value_grad, value_reduce_weight)
    else:
        rows = torch.addmm(reduced_key_grad @ key_reduce_weight, reduced_value_grad, value_reduce_weight)
        window_grads += rows.view(window_grads.shape)
    x_grad = kernels.spatial_attention_cuda_pixels(grad, x, z_grad, sizes.window, eps)

    branch = branch.flatten(0, 3)
    return [
        x_grad,
        _pixels(query_grad.sum(1), sizes),
        reduced_key_grad.unflatten(0, (*x.shape[:2], -1)).sum(1),
        query_grad.flatten(0, 2).T @ z.flatten(0, 2),
        reduced_key_grad.T @ windows,
        key_grad.flatten(0, 2).T @ reduced_key,
        reduced_value_grad.T @ windows,
        reduced_value_grad.sum(0),
        value_grad.flatten(0, 2).T @ value_rows,
        value_grad.sum((0, 1, 2)),
        branch.T @ mixture.flatten(0, 3),
        branch.sum(0),
    ]


def _pixels(tokens: Tensor, sizes: Sizes) -> Tensor:
    """[B, T, C] in the order of the windows as [B, H, W, C]."""
    down, across = sizes.windows
    r = sizes.window
    pixels = tokens.unflatten(1, (down, across, r, r)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return pixels[:, : sizes.height, : sizes.width].contiguous()
