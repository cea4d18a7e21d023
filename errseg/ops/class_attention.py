"""Attention among the classes of one pixel, with its MLP, at half resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect, expect_floating, expect_shape
from errseg.ops.contract import Op
from errseg.ops.cuda import class_attention as tensor_cores
from errseg.ops.gated_mlp import LAYER_NORM_EPS, FoldedGatedMLP, GatedMLPParams
from errseg.ops.precision import at_least_float32, without_autocast


class FoldedClassAttention(NamedTuple):
    """The published tensors with LayerNorms folded and the text columns split off."""

    query_weight: Tensor  # [C, C]     on z
    query_text_weight: Tensor  # [C, C]     on the text guidance
    query_bias: Tensor  # [C]
    key_weight: Tensor  # [C, C]     on z
    key_text_weight: Tensor  # [C, C]     on the text guidance
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]
    mlp: FoldedGatedMLP

    def to(self, like: Tensor) -> FoldedClassAttention:
        """Every tensor in the dtype of ``like``."""
        tensors = {name: getattr(self, name).to(like.dtype) for name in self._fields if name != "mlp"}
        return FoldedClassAttention(**tensors, mlp=FoldedGatedMLP(*(t.to(like.dtype) for t in self.mlp)))

    def text_terms(self, text_guidance: Tensor) -> tuple[Tensor, Tensor]:
        """What the text guidance [B, K, C] adds to queries and keys [B, K, C], once per class."""
        return (
            text_guidance @ self.query_text_weight.T + self.query_bias,
            text_guidance @ self.key_text_weight.T,
        )


@dataclass(frozen=True)
class ClassAttentionParams:
    """Published tensors of ``class_fusion.sa``: norm1, ``attention.*``, and norm2 with ``mlp.*``."""

    norm_weight: Tensor  # [C]
    norm_bias: Tensor  # [C]
    q_weight: Tensor  # [C, 2C]     columns: x, then text guidance
    q_bias: Tensor  # [C]
    k_weight: Tensor  # [C, 2C]
    k_bias: Tensor  # [C]
    v_weight: Tensor  # [C, C]
    v_bias: Tensor  # [C]
    proj_weight: Tensor  # [C, C]
    proj_bias: Tensor  # [C]
    mlp: GatedMLPParams

    @without_autocast
    def fold(self) -> FoldedClassAttention:
        """Fold norm1 into q, k, v and norm2 into the MLP.

        The keys' constant part is the same for every class, so it cancels in the softmax; it stays in the graph
        with factor zero so that its parameters keep a defined gradient.
        """
        gamma, beta = at_least_float32(self.norm_weight), at_least_float32(self.norm_bias)
        channels = gamma.shape[0]
        q_weight, q_text_weight = at_least_float32(self.q_weight).split(channels, dim=1)
        k_weight, k_text_weight = at_least_float32(self.k_weight).split(channels, dim=1)
        v_weight = at_least_float32(self.v_weight)
        cancelled = 0.0 * (k_weight @ beta + self.k_bias)
        return FoldedClassAttention(
            query_weight=q_weight * gamma,
            query_text_weight=q_text_weight,
            query_bias=self.q_bias + q_weight @ beta + cancelled,
            key_weight=k_weight * gamma,
            key_text_weight=k_text_weight,
            value_weight=v_weight * gamma,
            value_bias=self.v_bias + v_weight @ beta,
            out_weight=self.proj_weight,
            out_bias=self.proj_bias,
            mlp=self.mlp.fold(),
        )


def _fake(x: Tensor, *rest: object) -> Tensor:
    batch, num_classes, height, width, channels = x.shape
    return x.new_empty((batch, num_classes, height // 2, width // 2, channels))


_WEIGHTS = ("query_weight", "key_weight", "value_weight", "value_bias", "out_weight", "out_bias")
_TENSORS = ("x", "query_text", "key_text", *_WEIGHTS, *(f"mlp_{name}" for name in FoldedGatedMLP._fields))

OP = Op(
    "class_attention",
    f"({', '.join(f'Tensor {name}' for name in _TENSORS)}, Tensor? drop_attention, Tensor? drop_mlp, int num_heads, "
    "float eps) -> Tensor",
    reference=reference.class_attention,
    fake=_fake,
    differentiable=_TENSORS,
)


def _triton_can_run(x: Tensor, *rest: object) -> str | None:
    num_heads = rest[-2]
    assert isinstance(num_heads, int)
    if reason := triton_backend.heads_fit(x.shape[-1], num_heads):
        return reason
    numbers = x.shape[1:].numel()  # offsets within an image are 32 bits wide
    return None if numbers < 2**31 else f"images of less than 2**31 numbers, got {numbers}"


OP.register(
    "cpu",
    native.cpu_backend(
        "class_attention", trains=True, saved=("pooled",), fake_saved=lambda x, *rest: (_fake(x),), shape_only=("x",)
    ),
)
OP.register(
    "triton",
    triton_backend.backend(
        "class_attention",
        saved=("pooled",),
        fake_saved=lambda x, *rest: (_fake(x),),
        shape_only=("x",),
        can_run=_triton_can_run,
    ),
)
OP.register(
    "cuda",
    native.cuda_backend(
        "class_attention",
        forward=tensor_cores.forward,
        backward=tensor_cores.backward,
        saved=tensor_cores.SAVED,
        fake_saved=tensor_cores.fake_saved,
        shape_only=tensor_cores.SHAPE_ONLY,
        can_run=tensor_cores.can_run,
    ),
)


def class_attention(
    x: Tensor,
    text_guidance: Tensor,
    params: ClassAttentionParams | FoldedClassAttention,
    *,
    num_heads: int,
    drop_path: Tensor | tuple[Tensor, Tensor] | None = None,
    eps: float = LAYER_NORM_EPS,
    backend: str | None = None,
) -> Tensor:
    """The class block from 2x2 average pooling to its low-resolution output, residuals inside.

    With ``p`` the pooled map: ``u = p + attention among the K classes``, then ``u + ReLU6(gated_mlp(u))``. The
    classes are a set: permuting them permutes the output.

    Args:
        x: [B, K, H, W, C]; an odd last row or column is dropped by the pooling.
        text_guidance: [B, K, C], takes part in queries and keys.
        params: published tensors, or their ``fold()``.
        num_heads: divides C; scores are scaled by one over the square root of the head width.
        drop_path: [B, H // 2, W // 2] for both branches, or a pair (attention, MLP) as in the published recipe;
            0 for a dropped branch, else one over the keep probability.
        eps: of both LayerNorms.
        backend: strict choice of a backend.

    Returns:
        [B, K, H // 2, W // 2, C] in the dtype of ``x``.

    Raises:
        ValueError: on wrong shapes or a width that the heads do not divide.

    Source: paper, RRCA: class-level sequence reduction.
    """
    expect_floating(x, 5, "x [B, K, H, W, C] floating")
    batch, num_classes, height, width, channels = x.shape
    expect_shape(text_guidance, (batch, num_classes, channels), "text_guidance")
    expect(channels % num_heads == 0, f"num_heads that divides {channels}", num_heads)
    expect(min(height, width) >= 2, "x of at least 2 x 2 pixels", x)
    masks = drop_path if isinstance(drop_path, tuple) else (drop_path, drop_path)
    for mask in masks:
        expect_shape(mask, (batch, height // 2, width // 2), "drop_path")
    folded = (params.fold() if isinstance(params, ClassAttentionParams) else params).to(x)
    query_text, key_text = folded.text_terms(text_guidance.to(x.dtype))
    weights = (getattr(folded, name) for name in _WEIGHTS)
    return OP(x, query_text, key_text, *weights, *folded.mlp, *masks, num_heads, eps, backend=backend)
