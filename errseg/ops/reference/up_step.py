"""The up-decoder's step on composed weights: no upsampled map, no repeated guidance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def up_step(
    x: Tensor,
    added: Tensor,
    weight1: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight2: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """[B, K, H, W, C] -> [B, K, H', W', C']; see :func:`errseg.ops.up_step`.

    added [B, H', W', C'] is what guidance and biases contribute to the first convolution. weight1 is [C', C, 3, 3], or
    [2, 2, C', C, 2, 2]: by row and column of an output within its 2x2 block, a 2x2 window over the smaller map.
    """
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    own = F.conv2d(maps, weight1, padding=1) if weight1.ndim == 4 else _twice_as_large(maps, weight1)
    raw = own.unflatten(0, x.shape[:2]) + added.permute(0, 3, 1, 2)[:, None]
    maps = _normalized(raw.flatten(0, 1), norm1_weight, norm1_bias, groups, eps)
    raw = F.conv2d(maps, weight2, padding=1)
    maps = _normalized(raw, norm2_weight, norm2_bias, groups, eps)
    return maps.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2).contiguous().to(x.dtype)


def _twice_as_large(maps: Tensor, phases: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C', 2 H, 2 W]: windows of odd outputs begin one pixel further on."""
    rows = [
        torch.stack([F.conv2d(F.pad(maps, (1 - j, j, 1 - i, i)), phases[i, j]) for j in range(2)], dim=4)
        for i in range(2)
    ]
    return torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3)  # from [N, C', H, 2, W, 2]


def _normalized(maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm and ReLU. On CPUs PyTorch sums channels-last maps term by term: ever less exact the larger they are."""
    return F.relu(F.group_norm(maps.contiguous(), groups, weight, bias, eps))
