"""The operators of ERR-Seg, each behind one name with a choice of backends.

Public functions take the published parameters and fold them differentiably; ``backend=`` is strict, ``use_backend``
sets an order of preference, ``backends()`` says what runs here and why the rest does not.
"""

from errseg.ops.class_attention import ClassAttentionParams, FoldedClassAttention, class_attention
from errseg.ops.class_votes import class_votes
from errseg.ops.contract import BACKENDS, OPS, Backend, BackendError, Op, backends, use_backend
from errseg.ops.cost_embedding import CostEmbeddingParams, FoldedCostEmbedding, cost_embedding
from errseg.ops.cost_volume import cost_volume
from errseg.ops.depthwise_conv import depthwise_conv
from errseg.ops.gated_mlp import FoldedGatedMLP, GatedMLPParams, gated_mlp
from errseg.ops.reduce_vocabulary import reduce_vocabulary
from errseg.ops.select_classes import select_classes
from errseg.ops.spatial_attention import FoldedSpatialAttention, SpatialAttentionParams, spatial_attention
from errseg.ops.up_step import FoldedUpStep, UpStepParams, up_step
from errseg.ops.upsample_argmax import upsample_argmax
from errseg.ops.upsample_bce import upsample_bce
from errseg.ops.upsample_residual import upsample_residual

__all__ = [
    "BACKENDS",
    "OPS",
    "Backend",
    "BackendError",
    "ClassAttentionParams",
    "CostEmbeddingParams",
    "FoldedClassAttention",
    "FoldedCostEmbedding",
    "FoldedGatedMLP",
    "FoldedSpatialAttention",
    "FoldedUpStep",
    "GatedMLPParams",
    "Op",
    "SpatialAttentionParams",
    "UpStepParams",
    "backends",
    "class_attention",
    "class_votes",
    "cost_embedding",
    "cost_volume",
    "depthwise_conv",
    "gated_mlp",
    "reduce_vocabulary",
    "select_classes",
    "spatial_attention",
    "up_step",
    "upsample_argmax",
    "upsample_bce",
    "upsample_residual",
    "use_backend",
]
