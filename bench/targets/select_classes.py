"""The few classes that an image keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from errseg import ops
from errseg.bench.cases import Case, Counts, numel, vary
from errseg.bench.gate import Trial
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.targets._ops import EVAL_B, SMALL, T_AXIS


def _inputs(case: Case, seed: int) -> Inputs:
    """Votes without ties, so that every way of ranking gives the same set."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.stack([10 * torch.randperm(case.words, generator=generator) for _ in range(case.batch)]),)


def _topk(votes: Tensor, num_selected: int) -> Tensor:
    """What the published code does in evaluation; ties are left to chance."""
    return votes.topk(num_selected, dim=1).indices.sort(dim=1).values


def _check(trial: Trial) -> None:
    got, wanted = trial.of(trial.candidate).result, trial.of(trial.truth).result
    if not torch.equal(got, wanted):
        raise AssertionError(f"{(got != wanted).sum().item()} of {wanted.numel()} class ids differ")


def _counts(case: Case, itemsize: int, passing: str) -> Counts:
    return Counts(bytes=8 * numel((case.batch, case.words), (case.batch, case.kept)))


TARGET = Target(
    name="select_classes",
    ops=("select_classes",),
    cases=(EVAL_B, replace(EVAL_B, words=1_000_000)),
    quick=SMALL,
    sweeps=vary(EVAL_B, words=(*T_AXIS, 10_000, 100_000)),
    inputs=_inputs,
    implementations={
        "errseg": lambda case: Implementation(partial(ops.select_classes, num_selected=case.kept)),
        "published": lambda case: Implementation(partial(_topk, num_selected=case.kept)),
    },
    counts=_counts,
    check=_check,
)
