"""Shared by the tests of the attentions: arguments of raw ops, their reference, and what is near to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.testing import assert_close, assert_within_eager_error
from tests.cuda.emulated import EmulatorFault

Emulate = Callable[..., Any]
Break = tuple[str, str, str]  # source below csrc, text, replacement
HALF = torch.bfloat16, torch.float16
EPS = 1e-5

HEADS, TILES = "common/heads.cuh", "common/tiles.cuh"
SHRUNK = "mixed[n][2 * half] *= shrink, mixed[n][2 * half + 1] *= shrink;"
NOT_RESCALED: Break = (HEADS, SHRUNK, SHRUNK.replace("shrink", "1"))
WAITED = "        wait_async<0>();\n        __syncthreads();"
NO_BARRIER: Break = (TILES, WAITED, "        wait_async<0>();")


@dataclass(frozen=True)
class Shape:
    batch: int
    classes: int
    height: int
    width: int
    channels: int
    heads: int


def device_fixture(driver: str) -> Any:
    """A fixture of the kernels of a driver."""

    @pytest.fixture(scope="module")
    def device(emulate: Emulate) -> Any:
        return emulate(driver)

    return device


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    """What is not written stays NaN."""
    return torch.full(shape, torch.nan, dtype=dtype)


def linear(out: int, inner: int, gain: float = 1.0) -> Tensor:
    """A weight that keeps the size of numbers, times a gain."""
    return torch.randn(out, inner) * gain / inner**0.5


def expected(
    op: Callable[..., Tensor], differentiable: int, arguments: Sequence[Any], grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Result and gradients of a reference computed in `dtype`; the first arguments are differentiable."""
    cast: list[Any] = [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]
    leaves = [t.requires_grad_() for t in cast[:differentiable]]
    out = op(*leaves, *cast[differentiable:])
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


def assert_all_close(
    names: Sequence[str], found: Sequence[Tensor], right: Sequence[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Each of the dtype, of the right shape and near to it."""
    for name, got, wanted in zip(names, found, right, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape, name
        if wanted.abs().max() > 1e-9:
            assert_close(got, wanted, tolerance, name)
        else:  # with one to attend to there is nothing to choose
            assert got.abs().max() < 1e-2, name


def assert_all_within_eager_error(
    names: Sequence[str], found: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    for name, got, beside, right in zip(names, found, eager, exact, strict=True):
        assert_within_eager_error(got, beside, right, name=name)


def assert_broken(emulate: Emulate, driver: str, broken: Break, check: Callable[[Any], None]) -> None:
    """That a check fails for kernels with one text replaced."""
    source, *edit = broken
    device = emulate(driver, edits={source: tuple(edit)})
    with pytest.raises((AssertionError, EmulatorFault)):
        check(device)
