"""A small target with providers that misbehave, and rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from errseg.bench.cases import Case, Counts
from errseg.bench.precision import Precision
from errseg.bench.registry import Implementation, Inputs, Target
from errseg.bench.rows import Row
from errseg.bench.runner import Effort, Runner

CASE = Case(model="small", classes=5, words=11, size=32)


def inputs(case: Case, seed: int) -> Inputs:
    return (torch.randn(64, 3, generator=torch.Generator().manual_seed(seed)).bfloat16().float(),)


def square(x: Tensor) -> Tensor:
    return x * x


def fake_target(differentiable: bool = True, **implementations: Callable[..., Any]) -> Target:
    """x -> x * x for whoever does not say otherwise."""
    runs = {"errseg": square, "published": square} | implementations
    return Target(
        name="fake",
        ops=(),
        cases=(CASE,),
        quick=CASE,
        inputs=inputs,
        implementations={name: lambda case, run=run: Implementation(run) for name, run in runs.items()},
        counts=lambda case, itemsize, passing: Counts(vector=192, bytes=2 * 192 * itemsize),
        passes=("forward", "backward", "both"),
        differentiable=differentiable,
    )


def runner(**effort: Any) -> Runner:
    settings = Effort(**{"min_rounds": 2, "max_rounds": 2, "seconds": 0.0, **effort})
    return Runner(torch.device("cpu"), Precision("float32"), settings)


def row(provider: str = "cpu", **changes: Any) -> Row:
    """A measured row."""
    made = Row(
        run="r",
        target="upsample_argmax",
        case=CASE.to_dict(),
        label=CASE.label,
        provider=provider,
        passing="forward",
        precision="float32",
        tf32=False,
        device="cpu",
        status="ok",
        median_ms=2.0,
        q1_ms=1.9,
        q3_ms=2.1,
        rounds=5,
        speedup_published=10.0,
        speedup_reference=5.0,
        speedup_quartiles=(9.9, 10.1),
        peak_bytes=1000,
        peak_by="storages",
    )
    return replace(made, **changes)
