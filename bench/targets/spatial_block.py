"""The first half of a layer: attention among pixels, gated MLP, depthwise convolution, both residuals."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from errseg.bench.cases import Case, Counts
from errseg.bench.registry import Bar, Implementation, Inputs, Target
from errseg.bench.targets import _blocks as blocks
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, TRAIN
from errseg.testing.published_decoder import AggregatorLayer


def _inputs(case: Case, seed: int) -> Inputs:
    return blocks.inputs(case, seed)[:2]


def _run(module: nn.Module, x: Tensor, guidance: Tensor) -> Tensor:
    out: Tensor = module(x, guidance)
    return out


def _errseg(case: Case) -> Implementation:
    return Implementation(_run, module=blocks.layer(case).spatial, weights=blocks.own_weights("spatial"))


def _to_maps(inputs: Inputs) -> Inputs:
    x, guidance = inputs
    return blocks.to_maps(x), guidance.permute(0, 3, 1, 2).contiguous()


def _refine_space(module: Any, x: Tensor, guidance: Tensor) -> Tensor:
    size = x.shape[-2], x.shape[-1]
    out: Tensor = module.refine_space(x, blocks.repeated(guidance, len(x) // len(guidance)), size)
    return out


def _published(case: Case) -> Implementation:
    layer: AggregatorLayer = blocks.published_layer(case)
    weights = blocks.published_weights("spatial_fusion")
    return Implementation(_refine_space, _to_maps, blocks.to_tokens(case), layer, weights)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.kept * case.os16**2 * case.decoder.width
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, lambda out: out, results)


TARGET = Target(
    name="spatial_block",
    ops=("spatial_attention", "gated_mlp", "depthwise_conv"),
    cases=(EVAL_B, TRAIN),
    quick=SMALL,
    sweeps=tuple(case for case in OVER_CLASSES if case != TRAIN),
    inputs=_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    kinked=True,
    mixed=True,
    bars=(
        Bar(TRAIN, "forward", "cpu", "published", times=1.5),
        Bar(TRAIN, "both", "cpu", "published", times=2.5),
    ),
)
