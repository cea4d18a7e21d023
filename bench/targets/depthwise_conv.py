"""The depthwise 7x7 convolution with its residual."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts
from errseg.bench.registry import Bar, Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, sample_inputs

ROW_TOKENS = "n (h w) c -> n c h w"


def _prepare(inputs: Inputs) -> Inputs:
    x, weight, bias, residual, _ = inputs
    height = x.shape[2]
    return (*(t.flatten(0, 1).flatten(1, 2) for t in (x, residual)), weight, bias, height)


def _published(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, height: int) -> Tensor:
    """Tokens to maps, convolution, back to tokens, residual."""
    maps = rearrange(x, ROW_TOKENS, h=height)
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return residual + rearrange(maps, "n c h w -> n (h w) c")


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    width = case.decoder.width
    tokens = case.batch * case.kept * case.os16**2
    reads = itemsize * numel((2, tokens, width), (50, width))
    return product_counts(passing, 2 * 49 * width * tokens, reads, itemsize * tokens * width)


TARGET = Target(
    name="depthwise_conv",
    ops=("depthwise_conv",),
    cases=(EVAL_B,),
    quick=SMALL,
    sweeps=OVER_CLASSES,
    inputs=sample_inputs("depthwise_conv"),
    implementations={
        "errseg": lambda case: Implementation(ops.depthwise_conv),
        "published": lambda case: Implementation(
            _published,
            _prepare,
            lambda tokens: tokens.unflatten(1, (case.os16, -1)).unflatten(0, (case.batch, -1)),
        ),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    bars=(
        Bar(EVAL_B, "forward", "cpu", "published", times=1.5),
        Bar(EVAL_B, "both", "cpu", "published", times=2.5),
    ),
)
