"""The training loss over the selected classes."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, vary
from errseg.bench.registry import Bar, Implementation, Inputs, Target
from errseg.bench.targets._ops import SMALL, TRAIN
from errseg.testing.inputs import random_class_ids, random_logits, random_target
from errseg.testing.published_decoder import published_dense, published_loss

BASE = Case(classes=32, words=171, process_memory=True)
FLOOR = 1e-6  # relative; eager code may be right by chance to the last bit of one number


def _inputs(case: Case, seed: int) -> Inputs:
    side = case.size // 4
    logits = random_logits(case.batch, case.kept, side, side, seed=seed)
    class_ids = random_class_ids(case.batch, case.kept, case.words, seed=seed)
    return logits, class_ids, random_target(case.batch, *case.out, case.words, seed=seed)


def published(logits: Tensor, class_ids: Tensor, target: Tensor, words: int) -> Tensor:
    """Fill T maps, upsample, one-hot targets, cross-entropy over all of them."""
    return published_loss(published_dense(logits, class_ids, words), target)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    """Per class and pixel: upsampling 7, loss term 8, its gradient 4, the upsampling's adjoint 8.

    The gradient can be had in the forward pass, so that all which "backward" cannot do without is to multiply it.
    """
    low = numel((case.batch, case.kept, case.size // 4, case.size // 4))
    if passing == "backward":
        return Counts(vector=low, bytes=2 * itemsize * low)
    pixels = case.batch * case.out[0] * case.out[1]
    reads = itemsize * low + 8 * (case.batch * case.kept + pixels)
    if passing == "forward":
        return Counts(vector=15 * case.kept * pixels, bytes=reads + 4)
    return Counts(vector=27 * case.kept * pixels, bytes=reads + 4 + itemsize * low)


TARGET = Target(
    name="upsample_bce",
    ops=("upsample_bce",),
    cases=(BASE,),
    quick=SMALL,
    sweeps=vary(TRAIN, batch=(2, 4), words=(20, 59, 459, 847), classes=(16, 48), size=(320, 480)),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(partial(ops.upsample_bce, vocabulary_size=case.words)),
        "published": lambda case: Implementation(partial(published, words=case.words)),
    },
    counts=_counts,
    passes=("forward", "backward", "both"),
    differentiable=True,
    floor=FLOOR,
    bars=(
        Bar(BASE, "both", "cpu", "published", times=20),
        Bar(BASE, "both", "cpu", peak_bytes=20_000_000),
    ),
)
