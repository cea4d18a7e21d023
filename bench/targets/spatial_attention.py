"""Attention among the pixels of each class."""

from __future__ import annotations

from functools import partial

from einops import repeat
from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, norm_and_layers, sample_inputs, with_weights
from errseg.testing.published_decoder import SpatialAttention


class _NormAndAttention(nn.Module):
    """The first half of the published spatial block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SpatialAttention(width, num_heads)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """[B K, H W, C], [B, C, H, W] -> [B K, H W, C]."""
        size = guidance.shape[-2], guidance.shape[-1]
        num_classes = x.shape[0] // guidance.shape[0]
        repeated = repeat(guidance, "b c h w -> (b k) (h w) c", k=num_classes)
        return x + self.attention(self.norm1(x), repeated, size)


def _prepare(num_heads: int, inputs: Inputs) -> Inputs:
    x, guidance, params = inputs
    weights = norm_and_layers(params, "norm1", "attention.")
    module = with_weights(_NormAndAttention(x.shape[-1], num_heads), weights)
    return module, x.flatten(0, 1).flatten(1, 2), guidance.permute(0, 3, 1, 2).contiguous()


def _published(module: _NormAndAttention, x: Tensor, guidance: Tensor) -> Tensor:
    return module(x, guidance)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    """Queries, reductions, keys, values, scores and mixture, output; then what is done once per image."""
    c, maps, pixels, keys = case.decoder.width, case.batch * case.kept, case.os16**2, (case.os16 // 2) ** 2
    per_map = 2 * (2 * pixels * c * c) + 2 * keys * 4 * c * (2 * c + c) + 2 * keys * (2 * c * c + c * c)
    per_map += 4 * pixels * keys * c
    per_image = 2 * pixels * c * c + 2 * keys * 4 * c * 2 * c
    weights = numel((c, 2 * c), (2 * c, 8 * c), (c, 2 * c), (c, 4 * c), (2, c, c), (15, c))
    reads = itemsize * (numel((maps, pixels, c), (case.batch, pixels, c)) + weights)
    return product_counts(passing, maps * per_map + case.batch * per_image, reads, itemsize * maps * pixels * c)


TARGET = Target(
    name="spatial_attention",
    ops=("spatial_attention",),
    cases=(EVAL_B,),
    quick=SMALL,
    sweeps=OVER_CLASSES,
    inputs=sample_inputs("spatial_attention"),
    implementations={
        "errseg": lambda case: Implementation(partial(ops.spatial_attention, num_heads=case.decoder.num_heads)),
        "published": lambda case: Implementation(
            _published,
            partial(_prepare, case.decoder.num_heads),
            lambda tokens: tokens.unflatten(1, (case.os16, -1)).unflatten(0, (case.batch, -1)),
        ),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
)
