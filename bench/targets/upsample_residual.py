"""Bilinear upsampling (aligned corners) of the class block's result, plus the residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _blocks as blocks
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, TRAIN, sample_inputs


def _prepare(inputs: Inputs) -> Inputs:
    x, residual = inputs
    return blocks.to_maps(x), blocks.to_maps(residual)


def _published(x: Tensor, residual: Tensor) -> Tensor:
    """On channel-major maps, as the published code keeps them."""
    size = residual.shape[-2], residual.shape[-1]
    return residual + F.interpolate(x, size, mode="bilinear", align_corners=True)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    width, maps = case.decoder.width, case.batch * case.kept
    large, small = numel((maps, case.os16**2, width)), numel((maps, (case.os16 // 2) ** 2, width))
    counts = {
        "forward": Counts(vector=11 * large, bytes=itemsize * (2 * large + small)),
        "backward": Counts(vector=8 * large, bytes=itemsize * (large + small)),
    }
    return counts["forward"] + counts["backward"] if passing == "both" else counts[passing]


TARGET = Target(
    name="upsample_residual",
    ops=("upsample_residual",),
    cases=(EVAL_B, TRAIN),
    quick=SMALL,
    sweeps=tuple(case for case in OVER_CLASSES if case != TRAIN),
    inputs=sample_inputs("upsample_residual"),
    implementations={
        "errseg": lambda case: Implementation(ops.upsample_residual),
        "published": lambda case: Implementation(_published, _prepare, blocks.to_tokens(case)),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
)
