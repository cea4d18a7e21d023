"""The decoder: features and words to logits of the selected classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from errseg.bench.cases import Case, Counts, vary
from errseg.bench.gate import Trial
from errseg.bench.registry import Implementation, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import B_AXIS, EVAL_B, EVAL_L, K_AXIS, SIZE_AXIS, SMALL, T_AXIS


def run(module: nn.Module, features: Any, text: Tensor, num_selected: int, class_ids: Tensor | None) -> Any:
    """(logits, class_ids)."""
    return module(features, text, num_selected=num_selected, class_ids=class_ids)


def _errseg(case: Case) -> Implementation:
    return Implementation(run, module=networks.decoder(case), weights=networks.own_weights)


def _published(case: Case) -> Implementation:
    return Implementation(run, module=networks.published_decoder(case), weights=networks.published_weights)


def _check(trial: Trial) -> None:
    networks.check_logits(trial)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.kept * (case.size // 4) ** 2
    return networks.network_counts(case, itemsize, passing, networks.feature_inputs, _errseg, networks.first, results)


TARGET = Target(
    name="head",
    ops=networks.OPS,
    cases=(EVAL_B, EVAL_L),
    quick=SMALL,
    sweeps=vary(EVAL_B, words=T_AXIS, classes=K_AXIS, batch=B_AXIS, size=SIZE_AXIS),
    inputs=networks.feature_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    differentiable=True,
    kinked=True,
    differentiate=networks.first,
    check=_check,
    mixed=True,
)
