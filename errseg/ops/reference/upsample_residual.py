"""PyTorch's bilinear interpolation, read channels-last so that token-major maps need no permute."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_residual(x: Tensor, residual: Tensor) -> Tensor:
    """[B, K, h, w, C], [B, K, H, W, C] -> [B, K, H, W, C]; see :func:`errseg.ops.upsample_residual`."""
    image = x.flatten(0, 1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=residual.shape[2:4], mode="bilinear", align_corners=True)
    return (residual + image.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])).contiguous()
