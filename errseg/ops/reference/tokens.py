"""Pieces shared by the token-major references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops.precision import at_least_float32


def normalized(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis without its affine part, which is folded into the weights that follow."""
    return F.layer_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


def patches(x: Tensor, stride: int) -> Tensor:
    """Windows of r x r pixels: [..., H, W, C] -> [..., (H // r)(W // r), r r C]; a remainder is dropped."""
    *batch, height, width, channels = x.shape
    rows, columns = height // stride, width // stride
    x = x[..., : rows * stride, : columns * stride, :]
    x = x.reshape(*batch, rows, stride, columns, stride, channels).transpose(-4, -3)
    return x.reshape(*batch, rows * columns, stride * stride * channels)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of the last axis, kept as an axis; computed in float32 or better."""
    return torch.rsqrt(at_least_float32(x).square().mean(-1, keepdim=True) + eps).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention on [N, L, C] tokens, scores scaled by one over the square root of the head width."""
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(-3, -2).flatten(-2)
