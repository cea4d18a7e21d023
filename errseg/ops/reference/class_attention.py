"""The class block: pooling, attention among classes, gated MLP, two residuals."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from errseg.ops.reference.gated_mlp import gated_mlp
from errseg.ops.reference.tokens import attend, normalized


def class_attention(
    x: Tensor,
    query_text: Tensor,
    key_text: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mlp_gate_weight: Tensor,
    mlp_gate_bias: Tensor,
    mlp_value_weight: Tensor,
    mlp_value_bias: Tensor,
    mlp_out_weight: Tensor,
    mlp_out_bias: Tensor,
    drop_attention: Tensor | None,
    drop_mlp: Tensor | None,
    num_heads: int,
    eps: float,
) -> Tensor:
    """[B, K, H, W, C] -> [B, K, H // 2, W // 2, C]; see :func:`errseg.ops.class_attention`.

    query_text and key_text [B, K, C] hold the text guidance's share of queries and keys.
    """
    pooled = _average_pool(x)  # [B, K, h, w, C]
    z = normalized(pooled, eps)
    query = F.linear(z, query_weight) + query_text[:, :, None, None]
    key = F.linear(z, key_weight) + key_text[:, :, None, None]
    value = F.linear(z, value_weight, value_bias)
    query, key, value = (t.permute(0, 2, 3, 1, 4).flatten(0, 2) for t in (query, key, value))  # [B h w, K, C]
    out = attend(query, key, value, num_heads)
    batch, num_classes, height, width, channels = pooled.shape
    out = out.reshape(batch, height, width, num_classes, channels).permute(0, 3, 1, 2, 4)
    u = pooled + _dropped(F.linear(out, out_weight, out_bias), drop_attention)
    mlp = gated_mlp(
        u, mlp_gate_weight, mlp_gate_bias, mlp_value_weight, mlp_value_bias, mlp_out_weight, mlp_out_bias, eps
    )
    return (u + _dropped(F.relu6(mlp), drop_mlp)).contiguous()


def _average_pool(x: Tensor) -> Tensor:
    """2x2 means of a token-major map; an odd last row or column is dropped."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    x = x[:, :, : 2 * height, : 2 * width]
    return x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).mean((3, 5))


def _dropped(branch: Tensor, mask: Tensor | None) -> Tensor:
    return branch if mask is None else branch * mask[:, None, :, :, None].to(branch.dtype)
