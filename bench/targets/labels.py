"""Features and words to labels: decoder and post-processing, what a picture takes once the towers are done."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from errseg.bench.cases import Case, Counts, vary
from errseg.bench.registry import Bar, Implementation, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import B_AXIS, EVAL_B, EVAL_L, K_AXIS, SIZE_AXIS, SMALL, T_AXIS
from errseg.testing.published_decoder import published_dense, published_labels


def _run(
    module: nn.Module, features: Any, text: Tensor, num_selected: int, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, class_ids, labels)."""
    logits, class_ids = module(features, text, num_selected=num_selected, class_ids=class_ids)
    return logits, class_ids, networks.labels_of(logits, class_ids, _picture(logits))


def _run_published(
    module: nn.Module, features: Any, text: Tensor, num_selected: int, class_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits, class_ids = module(features, text, num_selected=num_selected, class_ids=class_ids)
    return logits, class_ids, published_labels(published_dense(logits, class_ids, len(text)), _picture(logits))


def _picture(logits: Tensor) -> tuple[int, int]:
    """The picture's size: logits are a quarter of it."""
    return 4 * logits.shape[2], 4 * logits.shape[3]


def _errseg(case: Case) -> Implementation:
    return Implementation(_run, module=networks.decoder(case), weights=networks.own_weights)


def _published(case: Case) -> Implementation:
    return Implementation(_run_published, module=networks.published_decoder(case), weights=networks.published_weights)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.size**2
    return networks.network_counts(case, itemsize, passing, networks.feature_inputs, _errseg, networks.first, results)


TARGET = Target(
    name="labels",
    ops=(*networks.OPS, "upsample_argmax"),
    cases=(EVAL_B, EVAL_L),
    quick=SMALL,
    sweeps=vary(EVAL_B, words=T_AXIS, classes=K_AXIS, batch=B_AXIS, size=SIZE_AXIS),
    inputs=networks.feature_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    differentiate=networks.first,
    check=networks.check_labels,
    mixed=True,
    bars=(Bar(EVAL_B, "forward", "cpu", "published", times=2.2),),
)
