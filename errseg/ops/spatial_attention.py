"""Attention among the pixels of one class, with keys and values at half resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from errseg.ops import native, reference, spatial_windows, triton_backend
from errseg.ops.checks import expect, expect_floating, expect_shape
from errseg.ops.contract import Op
from errseg.ops.cuda import spatial_attention as tensor_cores
from errseg.ops.gated_mlp import LAYER_NORM_EPS
from errseg.ops.precision import at_least_float32, without_autocast
from errseg.ops.reference.tokens import patches


class FoldedSpatialAttention(NamedTuple):
    """The published tensors with norms folded, means removed and the guidance columns split off.

    r is the stride of the key reduction (2); rows of the reductions are ordered as ``patches`` orders a window.
    """

    query_weight: Tensor  # [C, C]          on z
    query_guidance_weight: Tensor  # [C, C]          on the guidance
    query_bias: Tensor  # [C]
    key_reduce_weight: Tensor  # [2C, r r C]     centred, on z
    key_reduce_guidance_weight: Tensor  # [2C, r r C]     centred, on the guidance
    key_reduce_bias: Tensor  # [2C]            centred
    key_weight: Tensor  # [C, 2C]
    value_reduce_weight: Tensor  # [C, r r C]      centred
    value_reduce_bias: Tensor  # [C]             centred
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C]
    out_bias: Tensor  # [C]

    def guidance_maps(self, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """What the guidance [B,H,W,C] adds to queries [B,H,W,C] and to reduced keys [B,N_kv,2C], once per image."""
        channels = guidance.shape[-1]
        stride = round((self.key_reduce_weight.shape[1] // channels) ** 0.5)
        query_map = guidance @ self.query_guidance_weight.T + self.query_bias
        key_map = patches(guidance, stride) @ self.key_reduce_guidance_weight.T + self.key_reduce_bias
        return query_map, key_map


@dataclass(frozen=True)
class SpatialAttentionParams:
    """Published tensors of ``spatial_fusion.sa``: norm1 and ``attention.*``."""

    norm_weight: Tensor  # [C]
    norm_bias: Tensor  # [C]
    q_weight: Tensor  # [C, 2C]     columns: x, then guidance
    q_bias: Tensor  # [C]
    sr_k_weight: Tensor  # [2C, 2C, r, r]
    sr_k_bias: Tensor  # [2C]
    norm_k_weight: Tensor  # [2C]
    norm_k_bias: Tensor  # [2C]
    k_weight: Tensor  # [C, 2C]
    k_bias: Tensor  # [C]
    sr_v_weight: Tensor  # [C, C, r, r]
    sr_v_bias: Tensor  # [C]
    norm_v_weight: Tensor  # [C]
    norm_v_bias: Tensor  # [C]
    v_weight: Tensor  # [C, C]
    v_bias: Tensor  # [C]
    proj_weight: Tensor  # [C, C]
    proj_bias: Tensor  # [C]

    @without_autocast
    def fold(self) -> FoldedSpatialAttention:
        """Fold the LayerNorms: affine parts into the next linear map, mean removal into the one before.

        The keys' additive constant moves every score of a query alike and cancels in the softmax; it stays in
        the graph with factor zero so that its parameters keep a defined gradient.
        """
        p = SpatialAttentionParams(**{n: at_least_float32(getattr(self, n)) for n in self.__dataclass_fields__})
        channels = p.norm_weight.shape[0]
        sr_k, sr_k_guidance = _window_rows(_centred(p.sr_k_weight)).split(channels, dim=-1)
        sr_v = _window_rows(_centred(p.sr_v_weight))
        cancelled = 0.0 * (p.k_weight @ p.norm_k_bias + p.k_bias)
        q_weight, q_guidance_weight = p.q_weight.split(channels, dim=1)
        return FoldedSpatialAttention(
            query_weight=q_weight * p.norm_weight,
            query_guidance_weight=q_guidance_weight,
            query_bias=p.q_bias + q_weight @ p.norm_bias + cancelled,
            key_reduce_weight=(sr_k * p.norm_weight).flatten(1),
            key_reduce_guidance_weight=sr_k_guidance.flatten(1),
            key_reduce_bias=_centred(p.sr_k_bias) + (sr_k @ p.norm_bias).sum(1),
            key_weight=p.k_weight * p.norm_k_weight,
            value_reduce_weight=(sr_v * p.norm_weight).flatten(1),
            value_reduce_bias=_centred(p.sr_v_bias) + (sr_v @ p.norm_bias).sum(1),
            value_weight=p.v_weight * p.norm_v_weight,
            value_bias=p.v_bias + p.v_weight @ p.norm_v_bias,
            out_weight=p.proj_weight,
            out_bias=p.proj_bias,
        )


def _centred(weight: Tensor) -> Tensor:
    """Outputs with their mean over the output channels removed, as the LayerNorm that follows would."""
    return weight - weight.mean(0, keepdim=True)


def _window_rows(weight: Tensor) -> Tensor:
    """A strided convolution's weight [O, I, r, r] as [O, r r, I], window positions before channels."""
    return weight.permute(0, 2, 3, 1).flatten(1, 2)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


OP = Op(
    "spatial_attention",
    "(Tensor x, Tensor query_map, Tensor key_map, Tensor query_weight, Tensor key_reduce_weight, Tensor key_weight, "
    "Tensor value_reduce_weight, Tensor value_reduce_bias, Tensor value_weight, Tensor value_bias, Tensor out_weight, "
    "Tensor out_bias, Tensor? drop_path, int num_heads, float eps) -> Tensor",
    reference=reference.spatial_attention,
    fake=_fake,
    differentiable=(
        "x",
        "query_map",
        "key_map",
        "query_weight",
        "key_reduce_weight",
        "key_weight",
        "value_reduce_weight",
        "value_reduce_bias",
        "value_weight",
        "value_bias",
        "out_weight",
        "out_bias",
    ),
)


def _cpu_fake_saved(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The heads' mixture of values and log sums of the scores, for pixels window by window."""
    num_heads = rest[-2]
    assert isinstance(num_heads, int)
    batch, num_classes, height, width, channels = x.shape
    mixture = x.new_empty(batch, num_classes, height * width, channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return mixture, x.new_empty(batch, num_classes, num_heads, height * width, dtype=dtype)


def _triton_can_run(x: Tensor, *rest: object) -> str | None:
    num_heads = rest[-2]
    assert isinstance(num_heads, int)
    if reason := triton_backend.heads_fit(x.shape[-1], num_heads):
        return reason
    numbers = x.shape[2:].numel()  # offsets within a map are 32 bits wide
    return None if 4 * numbers < 2**31 else f"maps of less than 2**29 numbers, got {numbers}"


OP.register(
    "cpu",
    native.cpu_backend("spatial_attention", trains=True, saved=("mixture", "log_sums"), fake_saved=_cpu_fake_saved),
)
OP.register(
    "triton",
    triton_backend.backend(
        "spatial_attention",
        saved=spatial_windows.SAVED,
        fake_saved=spatial_windows.fake_saved,
        can_run=_triton_can_run,
    ),
)
OP.register(
    "cuda",
    native.cuda_backend(
        "spatial_attention",
        forward=tensor_cores.forward,
        backward=tensor_cores.backward,
        saved=spatial_windows.SAVED,
        fake_saved=spatial_windows.fake_saved,
        can_run=tensor_cores.can_run,
    ),
)


def spatial_attention(
    x: Tensor,
    guidance: Tensor,
    params: SpatialAttentionParams | FoldedSpatialAttention,
    *,
    num_heads: int,
    drop_path: Tensor | None = None,
    eps: float = LAYER_NORM_EPS,
    backend: str | None = None,
) -> Tensor:
    """``x + drop_path * attention(x, guidance)`` among the pixels of each class on its own.

    Queries come from every pixel, keys and values from 2x2 windows (an odd last row or column is dropped); the
    guidance takes part in queries and keys and is the same for every class.

    Args:
        x: [B, K, H, W, C] with H, W >= the window size.
        guidance: [B, H, W, C].
        params: published tensors, or their ``fold()``.
        num_heads: divides C; scores are scaled by one over the square root of the head width.
        drop_path: [B, K], 0 for a dropped branch, else one over the keep probability.
        eps: of every LayerNorm.
        backend: strict choice of a backend.

    Returns:
        [B, K, H, W, C] in the dtype of ``x``.

    Raises:
        ValueError: on wrong shapes or a width that the heads do not divide.

    Source: paper, RRCA: spatial-level sequence reduction, with per-image guidance split out of the per-class work.
    """
    expect_floating(x, 5, "x [B, K, H, W, C] floating")
    batch, num_classes, height, width, channels = x.shape
    expect_shape(guidance, (batch, height, width, channels), "guidance")
    expect_shape(drop_path, (batch, num_classes), "drop_path")
    expect(channels % num_heads == 0, f"num_heads that divides {channels}", num_heads)
    folded = params.fold() if isinstance(params, SpatialAttentionParams) else params
    window = (folded.value_reduce_weight.shape[1] // channels) ** 0.5
    expect(min(height, width) >= window, f"x of at least {window:g} x {window:g} pixels", x)
    folded = FoldedSpatialAttention(*(t.to(x.dtype) for t in folded))
    query_map, key_map = folded.guidance_maps(guidance.to(x.dtype))
    return OP(
        x,
        query_map,
        key_map,
        folded.query_weight,
        folded.key_reduce_weight,
        *folded[6:],
        drop_path,
        num_heads,
        eps,
        backend=backend,
    )
