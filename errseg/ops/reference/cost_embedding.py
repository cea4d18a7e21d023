"""One composed 7x7 convolution per scale, straight to C channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cost_embedding(cost16: Tensor, cost32: Tensor, weight16: Tensor, weight32: Tensor, bias: Tensor) -> Tensor:
    """[B, K, H, W], [B, K, h, w] -> [B, K, H, W, C]; see :func:`errseg.ops.cost_embedding`."""
    padding = weight16.shape[-1] // 2
    fine = F.conv2d(cost16.flatten(0, 1)[:, None], weight16, bias, padding=padding)
    coarse = F.conv2d(cost32.flatten(0, 1)[:, None], weight32, padding=padding)
    fine = fine + F.interpolate(coarse, size=cost16.shape[-2:], mode="bilinear", align_corners=False)
    return fine.permute(0, 2, 3, 1).unflatten(0, cost16.shape[:2]).contiguous()
