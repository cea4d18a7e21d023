"""Depthwise convolution: token-major against PyTorch's grouped convolution."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("depthwise_conv")


@backends
@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=1, classes=1, height=1, width=2), Sizes(height=17, width=8)])
def test_equals_the_published_order(sizes: Sizes, drop_path: bool, backend: str) -> None:
    call = sample("depthwise_conv", sizes, drop_path=drop_path)
    got = call(backend=backend)
    assert got.is_contiguous()
    assert_close(got, published(call), 1e-13)
    run = [gradients(f, call)[:4] for f in (lambda c: c(backend=backend), published)]
    for mine, wanted in zip(*run, strict=True):
        assert_close(mine, wanted, 1e-13)


@backends
def test_gradients(backend: str) -> None:
    call = sample("depthwise_conv", Sizes(batch=1, classes=2, height=4, width=3, channels=3))
    gradcheck(call, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    call = sample("depthwise_conv", drop_path=True).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@backends
@pytest.mark.parametrize("size", [1, 3, 5])
def test_bias_and_residual_are_optional_and_windows_odd(size: int, backend: str) -> None:
    x = sample("depthwise_conv").args[0]
    weight = torch.randn(x.shape[-1], 1, size, size, dtype=x.dtype)
    zero = torch.zeros_like(x)
    wanted = published(Sample(ops.depthwise_conv, (x, weight, None, zero, None), {}))
    assert_close(ops.depthwise_conv(x, weight, backend=backend), wanted, 1e-13)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, residual, _ = sample("depthwise_conv").args
    with pytest.raises(ValueError, match=r"weight \[16, 1, k, k\] with k odd, got \[16, 1, 6, 6\]"):
        ops.depthwise_conv(x, weight[..., :6, :6])
    with pytest.raises(ValueError, match=r"residual \[2, 5, 7, 9, 16\], got \[1, 5, 7, 9, 16\]"):
        ops.depthwise_conv(x, weight, bias, residual[:1])
    with pytest.raises(ValueError, match=r"drop_path \[2, 5\], got \[5, 2\]"):
        ops.depthwise_conv(x, weight, bias, residual, torch.ones(5, 2))
