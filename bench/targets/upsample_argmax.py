"""From logits to a label map."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, vary
from errseg.bench.gate import Trial, require
from errseg.bench.registry import Bar, Implementation, Inputs, Target
from errseg.bench.targets._ops import B_AXIS, EVAL_L, K_AXIS, SIZE_AXIS, SMALL, T_AXIS
from errseg.testing.inputs import random_class_ids, random_logits
from errseg.testing.published_decoder import published_dense, published_labels
from errseg.verify.checks import compare_labels

BASE = Case(process_memory=True)
PICTURE = Case(output=(512, 683))


def _inputs(case: Case, seed: int) -> Inputs:
    side = case.size // 4
    logits = random_logits(case.batch, case.kept, side, side, seed=seed)
    return logits, random_class_ids(case.batch, case.kept, case.words, seed=seed)


def published(logits: Tensor, class_ids: Tensor, words: int, size: tuple[int, int]) -> Tensor:
    """Fill T maps, sigmoid, upsample, argmax over T."""
    return published_labels(published_dense(logits, class_ids, words), size)


def eager(logits: Tensor, class_ids: Tensor, size: tuple[int, int]) -> Tensor:
    """The same over K, the straight way; ids ascend."""
    probabilities = logits.float().sigmoid()
    rows = F.interpolate(probabilities, size, mode="bilinear", align_corners=False).argmax(1)
    return class_ids.gather(1, rows.flatten(1)).reshape(rows.shape).to(torch.int32)


def check(trial: Trial) -> None:
    """Labels equal to float64's but for ties that the logits prove."""
    logits, class_ids = trial.eager.convert(trial.inputs)
    require(compare_labels(trial.of(trial.candidate).result, trial.of(trial.truth).result, logits, class_ids))


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    """Per low-resolution logit a sigmoid (3); per class and output pixel 4 products, 3 sums, 1 comparison."""
    low = numel((case.batch, case.kept, case.size // 4, case.size // 4))
    pixels = case.batch * case.out[0] * case.out[1]
    traffic = itemsize * low + 8 * case.batch * case.kept + 4 * pixels
    return Counts(vector=3 * low + 8 * case.kept * pixels, bytes=traffic)


TARGET = Target(
    name="upsample_argmax",
    ops=("upsample_argmax",),
    cases=(BASE, PICTURE),
    quick=SMALL,
    sweeps=(*vary(BASE, classes=K_AXIS, words=T_AXIS, batch=B_AXIS, size=SIZE_AXIS), EVAL_L),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(partial(ops.upsample_argmax, size=case.out)),
        "published": lambda case: Implementation(partial(published, words=case.words, size=case.out)),
        "eager": lambda case: Implementation(partial(eager, size=case.out)),
    },
    counts=_counts,
    check=check,
    bars=(
        Bar(BASE, "forward", "cpu", "eager", times=12),
        Bar(BASE, "forward", "cpu", "eager+compile", times=8),
        Bar(BASE, "forward", "cpu", "published", times=100),
    ),
)
