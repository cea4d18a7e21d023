"""Spatial attention with the LayerNorms and the guidance restructured exactly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from errseg.ops.reference.tokens import attend, inverse_rms, normalized, patches


def spatial_attention(
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
) -> Tensor:
    """[B, K, H, W, C] -> [B, K, H, W, C]; see :func:`errseg.ops.spatial_attention`.

    query_map [B, H, W, C] and key_map [B, N_kv, 2C] hold the guidance's share and the biases. The reductions'
    outputs have zero mean over channels, so their LayerNorm is a division by the root mean square.
    """
    channels = x.shape[-1]
    z = normalized(x, eps)
    windows = patches(z, round((value_reduce_weight.shape[1] // channels) ** 0.5))  # [B, K, N_kv, r r C]
    query = F.linear(z, query_weight) + query_map[:, None]  # [B, K, H, W, C]
    reduced_key = F.linear(windows, key_reduce_weight) + key_map[:, None]  # [B, K, N_kv, 2C]
    key = F.linear(reduced_key, key_weight) * inverse_rms(reduced_key, eps)
    reduced_value = F.linear(windows, value_reduce_weight, value_reduce_bias)  # [B, K, N_kv, C]
    value = F.linear(reduced_value, value_weight) * inverse_rms(reduced_value, eps) + value_bias
    out = attend(query.flatten(0, 1).flatten(1, 2), key.flatten(0, 1), value.flatten(0, 1), num_heads)
    out = F.linear(out, out_weight, out_bias).reshape(x.shape)
    if drop_path is not None:
        out = out * drop_path[:, :, None, None, None].to(out.dtype)
    return x + out
