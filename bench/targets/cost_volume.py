"""Cosines of the pixels with the selected words."""

from __future__ import annotations

import torch
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, product_counts, vary
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, OVER_CLASSES, SMALL, T_AXIS, TRAIN, sample_inputs
from errseg.testing.published_decoder import published_cost_volume


def _inputs(case: Case, seed: int) -> Inputs:
    """Images as the backbone leaves them, with the channels last."""
    images, *others = sample_inputs("cost_volume")(case, seed)
    return images.contiguous(memory_format=torch.channels_last), *others


def _published(image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor) -> Tensor:
    """All T cosines, then the K that are wanted."""
    cost = published_cost_volume(image_embeddings, text_embeddings)
    return torch.stack([image[ids] for image, ids in zip(cost, class_ids, strict=True)])


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    dim, pixels = case.decoder.text_dim, case.os16**2
    flops = 2 * case.batch * case.kept * dim * pixels
    reads = itemsize * numel((case.batch, dim, pixels), (case.batch, case.kept, dim)) + 8 * case.batch * case.kept
    return product_counts(passing, flops, reads, itemsize * numel((case.batch, case.kept, pixels)))


TARGET = Target(
    name="cost_volume",
    ops=("cost_volume",),
    cases=(EVAL_B, TRAIN),
    quick=SMALL,
    sweeps=(*OVER_CLASSES, *vary(EVAL_B, words=(*T_AXIS, 100_000))),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(ops.cost_volume),
        "published": lambda case: Implementation(_published),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
)
