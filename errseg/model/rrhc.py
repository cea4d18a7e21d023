"""RRHC: reduce the vocabulary to a few classes, take their costs at two depths, embed them (paper: RRHC)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from errseg import ops
from errseg.model.config import DecoderConfig
from errseg.model.folding import Foldable


class RRHCOutput(NamedTuple):
    """Cost embedding [B, K, H, W, C] of the selected classes and their ids [B, K] int64."""

    embedding: Tensor
    class_ids: Tensor


class CostEmbedding(Foldable):
    """Two 7x7 convolutions over the cost maps, averaged at 1/16 and projected: [B,K,H,W], [B,K,h,w] -> [B,K,H,W,C]."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.conv16 = nn.Conv2d(1, embed_dim, 7, padding=3)
        self.conv32 = nn.Conv2d(1, embed_dim, 7, padding=3)
        self.fusion = nn.Conv2d(embed_dim, width, 1)

    def published_params(self, *norms: nn.LayerNorm) -> ops.CostEmbeddingParams:
        """The published tensors as the op takes them."""
        return ops.CostEmbeddingParams(
            *_weight_and_bias(self.conv16), *_weight_and_bias(self.conv32), *_weight_and_bias(self.fusion)
        )

    def forward(self, cost16: Tensor, cost32: Tensor) -> Tensor:
        """Embed the costs, token-major."""
        return ops.cost_embedding(cost16, cost32, self.params())


class RRHC(nn.Module):
    """Redundancy-reduced hierarchical costs."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = CostEmbedding(config.embed_dim, config.width)

    def forward(
        self,
        os16_dense: Tensor,
        os32_dense: Tensor,
        text_embeddings: Tensor,
        *,
        num_selected: int,
        class_ids: Tensor | None = None,
        required: Tensor | None = None,
    ) -> RRHCOutput:
        """Select classes unless ``class_ids`` names them, then cost and embed the selected alone.

        Args:
            os16_dense: [B, D, H, W] pixel embeddings at 1/16.
            os32_dense: [B, D, h, w] pixel embeddings at 1/32.
            text_embeddings: [T, D].
            num_selected: K >= 1.
            class_ids: [B, K] int64, overrides the selection.
            required: [B, T] bool, ground-truth classes that the selection must keep (training).
        """
        if class_ids is None:
            class_ids = ops.reduce_vocabulary(os16_dense, text_embeddings, num_selected, required)
        cost16 = ops.cost_volume(os16_dense, text_embeddings, class_ids)
        cost32 = ops.cost_volume(os32_dense, text_embeddings, class_ids)
        return RRHCOutput(self.embedding(cost16, cost32), class_ids)


def _weight_and_bias(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight, layer.bias
