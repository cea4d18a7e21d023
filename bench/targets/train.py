"""One optimizer step of the head: forward, loss, backward, AdamW over the decoder's parameters.

The towers are left out, because they are the same for every provider and would hide the difference: features
come without gradient, as from frozen towers. Gradients are gated, the update is PyTorch's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from errseg import ops
from errseg.bench.cases import Case, Counts, vary
from errseg.bench.gate import Trial
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets import _networks as networks
from errseg.bench.targets._ops import SMALL, TRAIN
from errseg.bench.targets.upsample_bce import FLOOR
from errseg.testing.inputs import random_target
from errseg.testing.published_decoder import published_dense, published_loss


def _inputs(case: Case, seed: int) -> Inputs:
    features, text, kept, class_ids = networks.feature_inputs(case, seed)
    target = random_target(case.batch, *case.out, min(case.words, 6), seed=seed)
    required = torch.zeros(case.batch, case.words, dtype=torch.bool)
    required[:, : min(case.words, 6)] = True
    return features, text, kept, required, target, class_ids


def _errseg_loss(
    module: nn.Module, features: Any, text: Tensor, kept: int, required: Tensor, target: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits, ids = module(features, text, num_selected=kept, required=required, class_ids=ids)
    return ops.upsample_bce(logits, ids, target, vocabulary_size=len(text)), ids


def _published_loss(
    module: nn.Module, features: Any, text: Tensor, kept: int, required: Tensor, target: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits, ids = module(features, text, num_selected=kept, required=required, class_ids=ids)
    return published_loss(published_dense(logits, ids, len(text)), target), ids


def _errseg(case: Case) -> Implementation:
    return Implementation(_errseg_loss, module=networks.decoder(case), weights=networks.own_weights)


def _published(case: Case) -> Implementation:
    return Implementation(_published_loss, module=networks.published_decoder(case), weights=networks.published_weights)


def _check(trial: Trial) -> None:
    networks.check_logits(trial)


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    return networks.network_counts(case, itemsize, passing, _inputs, _errseg, networks.first, 1)


TARGET = Target(
    name="train",
    ops=(*networks.OPS, "upsample_bce"),
    cases=(TRAIN,),
    quick=SMALL,
    sweeps=(*vary(TRAIN, batch=(2, 4)), replace(TRAIN, model="l", size=768)),
    inputs=_inputs,
    implementations={"errseg": _errseg, "published": _published},
    counts=_counts,
    passes=("step",),
    differentiable=True,
    kinked=True,
    differentiate=networks.first,
    check=_check,
    floor=FLOOR,
    mixed=True,
)
