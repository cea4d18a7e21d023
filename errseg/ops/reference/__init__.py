"""The specification: every op in plain PyTorch, on any device and in any floating dtype, float64 included."""

from errseg.ops.reference.class_attention import class_attention
from errseg.ops.reference.class_votes import VOTE_DTYPE, class_votes
from errseg.ops.reference.cost_embedding import cost_embedding
from errseg.ops.reference.cost_volume import cost_volume
from errseg.ops.reference.depthwise_conv import depthwise_conv
from errseg.ops.reference.gated_mlp import gated_mlp
from errseg.ops.reference.select_classes import select_classes
from errseg.ops.reference.spatial_attention import spatial_attention
from errseg.ops.reference.up_step import up_step
from errseg.ops.reference.upsample_argmax import score_dtype, upsample_argmax
from errseg.ops.reference.upsample_bce import upsample_bce
from errseg.ops.reference.upsample_residual import upsample_residual

__all__ = [
    "VOTE_DTYPE",
    "class_attention",
    "class_votes",
    "cost_embedding",
    "cost_volume",
    "depthwise_conv",
    "gated_mlp",
    "score_dtype",
    "select_classes",
    "spatial_attention",
    "up_step",
    "upsample_argmax",
    "upsample_bce",
    "upsample_residual",
]
