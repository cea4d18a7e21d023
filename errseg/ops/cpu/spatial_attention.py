"""Attention among pixels, a few classes at a time: what is not a result stays in cache.

PyTorch's attention kernel for CPUs does the softmax; its log-sums are kept for the backward pass, with the mixture of
values. All else is computed again there, which is cheaper than to write and read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errseg.ops.cpu.slabs import Total, linear, normalize, normalize_backward
from errseg.ops.reference.tokens import inverse_rms, patches

CHUNK_TOKENS = 4096  # of a few classes
SAVED = ("mixture", "log_sums")


class Weights(NamedTuple):
    """The folded tensors, as the op takes them."""

    query: Tensor  # [C, C]
    key_reduce: Tensor  # [2C, r r C]
    key: Tensor  # [C, 2C]
    value_reduce: Tensor  # [C, r r C]
    value_reduce_bias: Tensor  # [C]
    value: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out: Tensor  # [C, C]
    out_bias: Tensor  # [C]


class Projected(NamedTuple):
    """Some classes of one image on their way to the softmax, k of them."""

    z: Tensor  # [k N, C]
    statistics: tuple[Tensor, Tensor]
    windows: Tensor  # [k N_kv, r r C]
    query: Tensor  # [k, N, C]
    reduced_key: Tensor  # [k, N_kv, 2C]
    key_scale: Tensor  # [k, N_kv, 1]
    raw_key: Tensor  # [k, N_kv, C], before the scale
    reduced_value: Tensor  # [k, N_kv, C]
    value_scale: Tensor  # [k, N_kv, 1]
    raw_value: Tensor  # [k, N_kv, C]

    def heads(self, value_bias: Tensor, num_heads: int) -> list[Tensor]:
        """Queries, keys and values [k, heads, N or N_kv, head width]."""
        value = torch.addcmul(value_bias, self.raw_value, self.value_scale)
        return [_heads(t, num_heads) for t in (self.query, self.raw_key * self.key_scale, value)]


def fake_saved(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Mixture [B, K, N, C] and log-sums [B, K, heads, N]."""
    batch, num_classes, height, width, channels = x.shape
    num_heads = rest[-2]
    mixture = x.new_empty(batch, num_classes, height * width, channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mixture, x.new_empty(batch, num_classes, num_heads, height * width, dtype=dtype)


def forward(x: Tensor, query_map: Tensor, key_map: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[B, K, H, W, C] -> [B, K, H, W, C]; see :func:`errseg.ops.spatial_attention`."""
    *tensors, drop_path, num_heads, eps, training = rest
    weights = Weights(*tensors)
    out = torch.empty(x.shape, dtype=x.dtype)
    saved = fake_saved(x, num_heads, eps) if training else (x.new_empty(0), x.new_empty(0))
    for image, classes in _chunks(x):
        here = image, classes
        p = _project(x[here], query_map[image], key_map[image], weights, eps)
        heads = p.heads(weights.value_bias, num_heads)
        mixture, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
        mixture = mixture.transpose(1, 2).flatten(2)
        branch = linear(mixture, weights.out, weights.out_bias).view(x[here].shape)
        if drop_path is not None:
            branch *= drop_path[here][:, None, None, None].to(branch.dtype)
        torch.add(x[here], branch, out=out[here])
        if training:
            saved[0][here], saved[1][here] = mixture, log_sums
    return out, *saved


def backward(grad: Tensor, x: Tensor, query_map: Tensor, key_map: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of tokens, maps and weights."""
    *tensors, drop_path, num_heads, eps, mixture, log_sums, _needed = rest
    weights = Weights(*tensors)
    d_x = torch.empty(x.shape, dtype=x.dtype)
    d_query_map, d_key_map = Total(query_map), Total(key_map)
    d_weights = {name: Total(weight) for name, weight in weights._asdict().items()}
    for image, classes in _chunks(x):
        here = image, classes
        p = _project(x[here], query_map[image], key_map[image], weights, eps)
        d_branch = grad[here].flatten(0, 2)
        if drop_path is not None:
            d_branch = (grad[here] * drop_path[here][:, None, None, None].to(grad.dtype)).flatten(0, 2)
        d_weights["out"].add_product(d_branch, mixture[here].flatten(0, 1))
        d_weights["out_bias"].add_rows(d_branch)
        d_mixture = _heads(linear(d_branch, weights.out.T).view(p.query.shape), num_heads)
        mixed = _heads(mixture[here], num_heads), log_sums[here]
        d_query, d_key, d_value = _attend_backward(d_mixture, p.heads(weights.value_bias, num_heads), *mixed)

        d_reduced_key = _unscale(d_key, p.reduced_key, p.key_scale, p.raw_key, weights.key, d_weights["key"])
        d_reduced_value = _unscale(
            d_value, p.reduced_value, p.value_scale, p.raw_value, weights.value, d_weights["value"]
        )
        d_weights["value_bias"].add_rows(d_value.flatten(0, 1))
        d_key_map.add_to(image, d_reduced_key)
        d_query_map.add_to(image, d_query.view(x[here].shape))

        d_reduced_key, d_reduced_value = d_reduced_key.flatten(0, 1), d_reduced_value.flatten(0, 1)
        d_weights["key_reduce"].add_product(d_reduced_key, p.windows)
        d_weights["value_reduce"].add_product(d_reduced_value, p.windows)
        d_weights["value_reduce_bias"].add_rows(d_reduced_value)
        d_query = d_query.flatten(0, 1)
        d_weights["query"].add_product(d_query, p.z)
        d_windows = linear(d_reduced_key, weights.key_reduce.T).add_(linear(d_reduced_value, weights.value_reduce.T))
        d_z = linear(d_query, weights.query.T)
        _add_windows(d_z.view(x[here].shape), d_windows)
        d_tokens = normalize_backward(d_z, x[here].flatten(0, 2), *p.statistics)
        torch.add(grad[here], d_tokens.view(x[here].shape), out=d_x[here])
    return [d_x, d_query_map.result(), d_key_map.result(), *(total.result() for total in d_weights.values())]


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """An image and some of its classes."""
    batch, num_classes, height, width, _ = x.shape
    size = max(1, CHUNK_TOKENS // (height * width))
    for image in range(batch):
        for start in range(0, num_classes, size):
            yield image, slice(start, start + size)


def _project(x: Tensor, query_map: Tensor, key_map: Tensor, weights: Weights, eps: float) -> Projected:
    """[k, H, W, C] of one image, its maps [H, W, C] and [N_kv, 2C]."""
    num_classes, channels = x.shape[0], x.shape[-1]
    z, *statistics = normalize(x.reshape(-1, channels), eps)
    stride = round((weights.value_reduce.shape[1] // channels) ** 0.5)
    windows = patches(z.view(x.shape), stride)  # [k, N_kv, r r C]
    query = linear(z, weights.query).view(num_classes, -1, channels)
    reduced_key = linear(windows, weights.key_reduce).add_(key_map)
    reduced_value = linear(windows, weights.value_reduce, weights.value_reduce_bias)
    return Projected(
        z=z,
        statistics=(statistics[0], statistics[1]),
        windows=windows.flatten(0, 1),
        query=query.add_(query_map.flatten(0, 1)),
        reduced_key=reduced_key,
        key_scale=inverse_rms(reduced_key, eps),
        raw_key=linear(reduced_key, weights.key),
        reduced_value=reduced_value,
        value_scale=inverse_rms(reduced_value, eps),
        raw_value=linear(reduced_value, weights.value),
    )


def _attend_backward(grad: Tensor, heads: list[Tensor], mixture: Tensor, log_sums: Tensor) -> list[Tensor]:
    """Gradients [k, N or N_kv, C] of queries, keys and values."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return [t.transpose(1, 2).flatten(2) for t in run(grad, *heads, mixture, log_sums, 0.0, False)]


def _heads(tokens: Tensor, num_heads: int) -> Tensor:
    """[k, N, C] -> [k, heads, N, head width]."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _unscale(grad: Tensor, reduced: Tensor, scale: Tensor, raw: Tensor, weight: Tensor, d_weight: Total) -> Tensor:
    """Backward through ``linear(reduced, weight) * inverse_rms(reduced)``."""
    d_raw = grad * scale
    d_weight.add_product(d_raw.flatten(0, 1), reduced.flatten(0, 1))
    share = (d_raw * raw).sum(-1, keepdim=True).mul_(scale.square()).div_(reduced.shape[-1])
    return torch.addcmul(linear(d_raw, weight.T), reduced, share, value=-1.0)


def _add_windows(z: Tensor, windows: Tensor) -> None:
    """Add windows [k N_kv, r r C] to the map [k, H, W, C] that they were cut from."""
    num_classes, height, width, channels = z.shape
    stride = round((windows.shape[1] // channels) ** 0.5)
    rows, columns = height // stride, width // stride
    cut = z[:, : rows * stride, : columns * stride]
    parts = windows.view(num_classes, rows, columns, stride, stride, channels)
    for y in range(stride):
        for x in range(stride):
            cut[:, y::stride, x::stride] += parts[:, :, :, y, x]
