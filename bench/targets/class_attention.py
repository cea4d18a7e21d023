"""The class block, from pooling to its low-resolution output."""

from __future__ import annotations

from functools import partial

from einops import rearrange
from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, norm_and_layers, sample_inputs, with_weights
from errseg.testing.published_decoder import AggregatorLayer, ClassBlock


class _ClassFusion(nn.Module):
    """The part of a published layer that `refine_classes` reads."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.class_fusion = nn.ModuleDict({"sa": ClassBlock(width, num_heads, hidden, 0.0)})

    def forward(self, x: Tensor, text_guidance: Tensor) -> Tensor:
        return AggregatorLayer.refine_classes(self, x, text_guidance)  # type: ignore[arg-type]


def _prepare(num_heads: int, inputs: Inputs) -> Inputs:
    x, text_guidance, params = inputs
    weights = norm_and_layers(params, "norm1", "attention.", skip=("mlp",))
    weights |= norm_and_layers(params.mlp, "norm2", "mlp.")
    module = _ClassFusion(x.shape[-1], num_heads, params.mlp.fc1_weight.shape[0])
    with_weights(module, {f"class_fusion.sa.{name}": tensor for name, tensor in weights.items()})
    return module, rearrange(x, "b k h w c -> (b k) c h w").contiguous(), text_guidance


def _published(module: _ClassFusion, x: Tensor, text_guidance: Tensor) -> Tensor:
    return module(x, text_guidance)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    c, hidden, maps = case.decoder.width, case.decoder.mlp_dim, case.batch * case.kept
    pooled = (case.os16 // 2) ** 2
    tokens = maps * pooled
    flops = 4 * 2 * tokens * c * c + 4 * tokens * case.kept * c + 6 * tokens * c * hidden + 2 * 2 * maps * c * c
    weights = numel((6, c, c), (9, c), (3, c, hidden), (2, hidden))
    reads = itemsize * (numel((maps, case.os16**2, c), (maps, c)) + weights)
    return product_counts(passing, flops, reads, itemsize * tokens * c)


TARGET = Target(
    name="class_attention",
    ops=("class_attention",),
    cases=(EVAL_B,),
    quick=SMALL,
    sweeps=OVER_CLASSES,
    inputs=sample_inputs("class_attention"),
    implementations={
        "errseg": lambda case: Implementation(partial(ops.class_attention, num_heads=case.decoder.num_heads)),
        "published": lambda case: Implementation(
            _published,
            partial(_prepare, case.decoder.num_heads),
            lambda maps: rearrange(maps, "(b k) c h w -> b k h w c", b=case.batch),
        ),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    kinked=True,
)
