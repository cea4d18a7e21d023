"""RRHC: pixel and word embeddings to the cost embedding of the selected classes."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from errseg.bench.cases import Case, Counts, vary
from errseg.bench.gate import Trial
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import B_AXIS, EVAL_B, EVAL_L, K_AXIS, SIZE_AXIS, SMALL, T_AXIS
from errseg.model.decoder import published_name
from errseg.testing.published_decoder import (
    PublishedDecoder,
    gather_classes,
    published_cost_volume,
    published_selection,
    published_votes,
)

PUBLISHED_PARTS = ("corr_proj_convs", "low_corr_fusion")


def _run(module: nn.Module, features: Any, text: Tensor, num_selected: int, class_ids: Tensor | None) -> Any:
    """(embedding [B, K, H, W, C], class_ids)."""
    dense = features.os16_dense, features.os32_dense
    return module(*dense, text, num_selected=num_selected, class_ids=class_ids)


def _errseg(case: Case) -> Implementation:
    weights = lambda module: {published_name(f"rrhc.{n}"): p for n, p in module.named_parameters()}  # noqa: E731
    return Implementation(_run, module=networks.decoder(case).rrhc, weights=weights)


def _run_published(module: Any, features: Any, text: Tensor, num_selected: int, class_ids: Tensor | None) -> Any:
    """The cost of every word at both depths first."""
    costs = [published_cost_volume(dense, text) for dense in (features.os16_dense, features.os32_dense)]
    if class_ids is None:
        class_ids = published_selection(published_votes(costs[0]), num_selected)
    return module.embed_costs(*(gather_classes(cost, class_ids) for cost in costs)), class_ids


def _published(case: Case) -> Implementation:
    module: PublishedDecoder = networks.published_decoder(case)
    weights = lambda m: {n: p for n, p in m.named_parameters() if n.startswith(PUBLISHED_PARTS)}  # noqa: E731

    def canonical(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        maps, class_ids = result
        return rearrange(maps, "(b k) c h w -> b k h w c", b=case.batch), class_ids

    return Implementation(_run_published, canonical=canonical, module=module, weights=weights)


def _embedding(result: Any) -> Tensor:
    embedding: Tensor = result[0]
    return embedding


def _check(trial: Trial) -> None:
    networks.check_logits(trial)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    results = case.batch * case.kept * case.os16**2 * case.decoder.width
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, _embedding, results)


def _inputs(case: Case, seed: int) -> Inputs:
    return networks.feature_inputs(case, seed)


TARGET = Target(
    name="rrhc",
    ops=("class_votes", "select_classes", "cost_volume", "cost_embedding"),
    cases=(EVAL_B, EVAL_L),
    quick=SMALL,
    sweeps=vary(EVAL_B, words=T_AXIS, classes=K_AXIS, batch=B_AXIS, size=SIZE_AXIS),
    inputs=_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    differentiable=True,
    differentiate=_embedding,
    check=_check,
    mixed=True,
)
