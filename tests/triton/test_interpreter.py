"""The repaired interpreter: bfloat16 arithmetic, and products that do not depend on the column."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from errseg.testing.interpreter import repair  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)
repair()


@triton.jit
def _elementwise_kernel(x, y, added, compared, cast, halved, N: tl.constexpr):
    lanes = tl.arange(0, N)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    tl.store(added + lanes, a + b)
    tl.store(compared + lanes, a < b)
    tl.store(cast + lanes, a.to(tl.float32))
    tl.store(halved + lanes, (a.to(tl.float32) / 3.0).to(tl.bfloat16))


@triton.jit
def _dot_kernel(x, y, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    square = lanes[:, None] * N + lanes[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square), input_precision="ieee"))


def test_bfloat16_is_added_compared_and_rounded_to_nearest_even() -> None:
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    added, halved = torch.empty_like(x), torch.empty_like(x)
    compared, cast = torch.empty(64, dtype=torch.bool), torch.empty(64)
    _elementwise_kernel[(1,)](x, y, added, compared, cast, halved, N=64)
    assert torch.equal(added, x + y)
    assert torch.equal(compared, x < y)
    assert torch.equal(cast, x.float())
    assert torch.equal(halved, (x.float() / 3).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_right_and_equal_columns_get_equal_results(dtype: torch.dtype) -> None:
    x, y = torch.randn(64, 64).to(dtype), torch.randn(64, 16).to(dtype).repeat(1, 4)
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](x, y.contiguous(), out, N=64)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, out[:, :16].repeat(1, 4))


def test_a_second_repair_changes_nothing() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    repair()
    assert InterpreterBuilder.create_dot is before
