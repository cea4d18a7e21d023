"""ConvNeXt blocks on two maps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def two_maps(blocks: nn.Sequential, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, h, w] of different sizes through the same ConvNeXt blocks, in inference.

    Everything but the depthwise convolution treats pixels one by one: one product takes those of both maps.
    """
    block: Any
    for block in blocks:
        tokens = [block.conv_dw(x).permute(0, 2, 3, 1) for x in (first, second)]
        joint = block.mlp(block.norm(torch.cat([t.flatten(0, 2) for t in tokens])))
        if block.gamma is not None:
            joint = joint * block.gamma
        parts = joint.split([t[..., 0].numel() for t in tokens])
        first, second = (
            x + part.view(t.shape).permute(0, 3, 1, 2)
            for x, part, t in zip((first, second), parts, tokens, strict=True)
        )
    return first, second
