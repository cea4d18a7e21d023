"""Spatial attention: the library's kernels around products of cuBLAS.

Forward, windows of normalised pixels become keys and values, a few maps at a time; one launch does all the rest.
Backward, two launches make the gradients of queries, keys and values, and what the products of the others need; see
``backward`` for the transient memory. Tokens, in the order of the windows, are those of csrc/spatial_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errseg.ops.cuda.arguments import ready, why_not
from errseg.ops.spatial_windows import Handed, Sizes, empty_saved, zero_gradients

CHUNK_BYTES = 32 << 20  # of normalised windows: little beside the maps, much beside a launch

kernels: Any = torch.ops.errseg


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
        saved = empty_saved(x, sizes, num_heads)
        return torch.empty_like(x), *(t if training else t.new_empty(0) for t in saved)
    weights = key_reduce_weight, key_weight, value_reduce_weight, value_reduce_bias, value_weight, value_bias
    key, value = _keys_and_values(sizes, eps, x, ready(key_map), *weights)
    drop_path = None if drop_path is None else ready(drop_path.to(x.dtype))
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
        weights = query_weight, key_reduce_weight, key_weight, value_reduce_weight, value_reduce_bias, value_weight
        return zero_gradients(x, query_map, key_map, *weights, value_bias, out_weight, out_bias)
    sizes = Sizes.of(x, value_reduce_weight)
    x, grad = ready(x), ready(grad)
    branch = grad if drop_path is None else grad * drop_path[:, :, None, None, None].to(grad.dtype)
    z, query_grad, key_grad, value_grad = kernels.spatial_attention_cuda_attend_bwd(
        *(branch, x, ready(query_map), key, value, ready(query_weight), ready(out_weight.T), mixture, log_sums),
        *(sizes.window, eps),
    )
    windows = sizes.whole_windows(z).flatten(0, 3)  # a view of an even map
    reduced_key, reduced_value = windows @ key_reduce_weight.T, windows @ value_reduce_weight.T
    reduced_key_grad = key_grad.flatten(0, 2) @ key_weight
    reduced_value_grad = value_grad.flatten(0, 2) @ value_weight
    kernels.spatial_attention_cuda_rows(reduced_key, ready(key_map), eps, reduced_key_grad)
    kernels.spatial_attention_cuda_rows(reduced_value, ready(value_reduce_bias), eps, reduced_value_grad)

    z_grad = query_grad @ query_weight
    window_grads = sizes.whole_windows(z_grad)
    if window_grads.is_contiguous():
        rows = window_grads.view(windows.shape)
        rows.addmm_(reduced_key_grad, key_reduce_weight).addmm_(reduced_value_grad, value_reduce_weight)
    else:
        rows = torch.addmm(reduced_key_grad @ key_reduce_weight, reduced_value_grad, value_reduce_weight)
        window_grads += rows.view(window_grads.shape)
    x_grad = kernels.spatial_attention_cuda_pixels(grad, x, z_grad, sizes.window, eps)

    of_keys, of_values = (reduced_key, reduced_key_grad), (reduced_value, reduced_value_grad)
    handed = Handed(z, query_grad, key_grad, value_grad, windows, *of_keys, *of_values)
    return handed.gradients(sizes, x_grad, branch, mixture)
