"""The grouped convolution, read channels-last so that token-major maps need no permute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TRAINED_MAPS = 16  # at a time: on a CPU the weight's gradient is summed term by term, ever less exactly


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, drop_path: Tensor | None
) -> Tensor:
    """[B, K, H, W, C] -> [B, K, H, W, C]; see :func:`errseg.ops.depthwise_conv`."""
    channels, padding = x.shape[-1], weight.shape[-1] // 2
    image = x.flatten(0, 1).permute(0, 3, 1, 2)
    trained = torch.is_grad_enabled() and weight.requires_grad
    if x.device.type == "cpu" and trained and len(image) > TRAINED_MAPS:
        parts = image.split(TRAINED_MAPS)
        out = torch.cat([F.conv2d(part, weight, bias, padding=padding, groups=channels) for part in parts])
    else:
        out = F.conv2d(image, weight, bias, padding=padding, groups=channels)
    out = out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
    if drop_path is not None:
        out = out * drop_path[:, :, None, None, None].to(out.dtype)
    return (out if residual is None else residual + out).contiguous()
