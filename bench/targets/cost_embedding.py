"""From two cost maps per class to C channels."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts, vary
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, TRAIN, sample_inputs, with_weights
from errseg.testing.published_decoder import PublishedDecoder


class _Embedding(nn.Module):
    """The part of the published decoder that `embed_costs` reads."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.corr_proj_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(1, embed_dim, 7, padding=3)) for _ in range(2))
        self.low_corr_fusion = nn.Conv2d(embed_dim, width, 1)

    def forward(self, cost16: Tensor, cost32: Tensor) -> Tensor:
        return PublishedDecoder.embed_costs(self, cost16, cost32)  # type: ignore[arg-type]


def _prepare(inputs: Inputs) -> Inputs:
    cost16, cost32, p = inputs
    weights = {
        "corr_proj_convs.0.0.weight": p.conv16_weight,
        "corr_proj_convs.0.0.bias": p.conv16_bias,
        "corr_proj_convs.1.0.weight": p.conv32_weight,
        "corr_proj_convs.1.0.bias": p.conv32_bias,
        "low_corr_fusion.weight": p.fusion_weight,
        "low_corr_fusion.bias": p.fusion_bias,
    }
    width, embed_dim = p.fusion_weight.shape[:2]
    return with_weights(_Embedding(embed_dim, width), weights), cost16, cost32


def _published(module: _Embedding, cost16: Tensor, cost32: Tensor) -> Tensor:
    return module(cost16, cost32)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    maps, pixels, coarse = case.batch * case.kept, case.os16**2, case.os32**2
    width, embed = case.decoder.width, case.decoder.embed_dim
    flops = 2 * 49 * width * maps * (pixels + coarse)
    reads = itemsize * numel((maps, pixels + coarse), (2, embed, 50), (width, embed + 1))
    return product_counts(passing, flops, reads, itemsize * numel((maps, pixels, width)))


TARGET = Target(
    name="cost_embedding",
    ops=("cost_embedding",),
    cases=(EVAL_B,),
    quick=SMALL,
    sweeps=(*OVER_CLASSES, TRAIN, *vary(TRAIN, batch=(4,))),
    inputs=sample_inputs("cost_embedding"),
    implementations={
        "errseg": lambda case: Implementation(ops.cost_embedding),
        "published": lambda case: Implementation(
            _published,
            _prepare,
            lambda maps: rearrange(maps, "(b k) c h w -> b k h w c", b=case.batch),
        ),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
)
