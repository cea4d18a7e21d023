"""The second half of a layer: pooling, attention among classes, gated MLP, upsampling, residual."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from errseg.bench.cases import Case, Counts
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _blocks as blocks
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, TRAIN


def _inputs(case: Case, seed: int) -> Inputs:
    x, _, text_guidance = blocks.inputs(case, seed)
    return x, text_guidance


def _run(module: nn.Module, x: Tensor, text_guidance: Tensor) -> Tensor:
    out: Tensor = module(x, text_guidance)
    return out


def _errseg(case: Case) -> Implementation:
    return Implementation(_run, module=blocks.layer(case).classes, weights=blocks.own_weights("classes"))


def _to_maps(inputs: Inputs) -> Inputs:
    x, text_guidance = inputs
    return blocks.to_maps(x), text_guidance


def _refine_classes(module: Any, x: Tensor, text_guidance: Tensor) -> Tensor:
    size = x.shape[-2], x.shape[-1]
    return x + F.interpolate(module.refine_classes(x, text_guidance), size, mode="bilinear", align_corners=True)


def _published(case: Case) -> Implementation:
    layer, weights = blocks.published_layer(case), blocks.published_weights("class_fusion")
    return Implementation(_refine_classes, _to_maps, blocks.to_tokens(case), layer, weights)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.kept * case.os16**2 * case.decoder.width
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, lambda out: out, results)


TARGET = Target(
    name="class_block",
    ops=("class_attention", "upsample_residual"),
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
)
