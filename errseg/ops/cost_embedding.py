"""From two cost maps per class to C channels per class and pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from errseg.ops import reference, triton_backend
from errseg.ops.checks import expect, expect_floating
from errseg.ops.contract import Op
from errseg.ops.precision import at_least_float32, without_autocast


class FoldedCostEmbedding(NamedTuple):
    """One 7x7 convolution per scale, straight to C channels: weights [C, 1, 7, 7], bias [C]."""

    weight16: Tensor
    weight32: Tensor
    bias: Tensor


@dataclass(frozen=True)
class CostEmbeddingParams:
    """Published tensors: two convolutions 7x7 from 1 to E channels and the 1x1 fusion from E to C."""

    conv16_weight: Tensor  # [E, 1, 7, 7]   corr_proj_convs.0.0
    conv16_bias: Tensor  # [E]
    conv32_weight: Tensor  # [E, 1, 7, 7]   corr_proj_convs.1.0
    conv32_bias: Tensor  # [E]
    fusion_weight: Tensor  # [C, E, 1, 1]   low_corr_fusion
    fusion_bias: Tensor  # [C]

    @without_autocast
    def fold(self) -> FoldedCostEmbedding:
        """Compose the linear chain: the 1x1 commutes with bilinear upsampling, whose weights sum to one."""
        fusion = 0.5 * at_least_float32(self.fusion_weight)[:, :, 0, 0]
        weight16 = torch.einsum("ce,eiyx->ciyx", fusion, at_least_float32(self.conv16_weight))
        weight32 = torch.einsum("ce,eiyx->ciyx", fusion, at_least_float32(self.conv32_weight))
        bias = fusion @ at_least_float32(self.conv16_bias + self.conv32_bias) + at_least_float32(self.fusion_bias)
        return FoldedCostEmbedding(weight16, weight32, bias)


def _fake(cost16: Tensor, cost32: Tensor, weight16: Tensor, weight32: Tensor, bias: Tensor) -> Tensor:
    return cost16.new_empty((*cost16.shape, bias.shape[0]))


OP = Op(
    "cost_embedding",
    "(Tensor cost16, Tensor cost32, Tensor weight16, Tensor weight32, Tensor bias) -> Tensor",
    reference=reference.cost_embedding,
    fake=_fake,
    differentiable=("cost16", "cost32", "weight16", "weight32", "bias"),
)


def _can_run(cost16: Tensor, cost32: Tensor, weight16: Tensor, weight32: Tensor, bias: Tensor) -> str | None:
    windows = {tuple(w.shape[1:]) for w in (weight16, weight32)}
    if windows != {(1, 7, 7)}:
        return f"windows of 7 x 7, got {list(weight16.shape)} and {list(weight32.shape)}"
    dtypes = {t.dtype for t in (cost16, cost32, weight16, weight32, bias)}
    if len(dtypes) > 1:
        return f"one dtype, got {', '.join(sorted(map(str, dtypes)))}"
    return triton_backend.sides_fit(*cost16.shape[2:], *cost32.shape[2:])


OP.register("triton", triton_backend.backend("cost_embedding", can_run=_can_run))


def cost_embedding(
    cost16: Tensor,
    cost32: Tensor,
    params: CostEmbeddingParams | FoldedCostEmbedding,
    *,
    backend: str | None = None,
) -> Tensor:
    """Embed the cost maps of both depths: 7x7 windows, average of the scales, projection to C channels.

    Args:
        cost16: [B, K, H, W] cosines at 1/16.
        cost32: [B, K, h, w] cosines at 1/32; brought to H x W bilinearly (half-pixel centres).
        params: published tensors, or their ``fold()``.
        backend: strict choice of a backend.

    Returns:
        [B, K, H, W, C], token-major, in the dtype of ``cost16``.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, RRHC: hierarchical cost maps.
    """
    expect_floating(cost16, 4, "cost16 [B, K, H, W] floating")
    expect(cost32.ndim == 4 and cost32.shape[:2] == cost16.shape[:2], "cost32 [B, K, h, w] like cost16", cost32)
    expect(min(cost32.shape[2:]) > 0, "cost32 of at least one pixel", cost32)
    folded = params.fold() if isinstance(params, CostEmbeddingParams) else params
    return OP(cost16, cost32, *(t.to(cost16.dtype) for t in folded), backend=backend)
