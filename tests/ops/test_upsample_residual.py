"""Upsampling with aligned corners plus residual, against PyTorch's interpolation of channel-major maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("upsample_residual")
PAIRS = [  # (h, w) to (H, W)
    ((2, 3), (5, 7)),
    ((3, 4), (7, 9)),
    ((1, 1), (3, 2)),
    ((2, 2), (1, 1)),
    ((2, 1), (1, 4)),
    ((5, 6), (5, 6)),
    ((7, 5), (3, 2)),
    ((4, 20), (8, 41)),
]


@backends
@pytest.mark.parametrize(("low", "high"), PAIRS)
def test_equals_interpolation(low: tuple[int, int], high: tuple[int, int], backend: str) -> None:
    x = torch.randn(2, 3, *low, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, *high, 5, dtype=torch.float64, requires_grad=True)
    got = ops.upsample_residual(x, residual, backend=backend)
    image = F.interpolate(x.permute(0, 1, 4, 2, 3).flatten(0, 1), high, mode="bilinear", align_corners=True)
    wanted = residual + image.unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2)
    assert got.is_contiguous()
    assert_close(got, wanted, 1e-14)
    weights = torch.randn_like(residual)
    for mine, exact in zip(*(torch.autograd.grad(y, (x, residual), weights) for y in (got, wanted)), strict=True):
        assert_close(mine, exact, 1e-14)


@backends
def test_corners_are_the_corners(backend: str) -> None:
    """Aligned corners: the four outermost values arrive unchanged."""
    call = sample("upsample_residual", Sizes(height=9, width=7))
    x, residual = call.args
    change = call(backend=backend) - residual
    for row in (0, -1):
        for column in (0, -1):
            assert_close(change[:, :, row, column], x[:, :, row, column], 1e-14)


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("upsample_residual", Sizes(batch=1, classes=2, height=5, width=4, channels=3)), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("channels", [5, 136])
def test_error_is_at_most_twice_eager(channels: int, dtype: torch.dtype, backend: str) -> None:
    call = sample("upsample_residual", Sizes(height=8, width=21, channels=channels)).to(dtype)
    truth = call.to(torch.float64)
    assert_within_eager_error(call(backend=backend), published(call), truth(backend="reference"))
    runs = (lambda c: c(backend=backend), call), (published, call), (published, truth)
    for name, mine, eager, exact in zip(("x", "residual"), *(gradients(f, c) for f, c in runs), strict=True):
        assert mine.dtype == dtype
        assert_within_eager_error(mine, eager, exact, name=name)


@backends
def test_only_shapes_are_kept_for_the_backward_pass(backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch decides what its own operators keep")
    x, residual = (t.requires_grad_() for t in sample("upsample_residual").args)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.upsample_residual(x, residual, backend=backend)
    assert sum(t.untyped_storage().nbytes() for t in kept) <= 2 * x.element_size()


def test_wrong_arguments_are_named() -> None:
    x, residual = sample("upsample_residual").args
    with pytest.raises(ValueError, match=r"residual \[2, 5, H, W, 16\], got \[2, 4, 7, 9, 16\]"):
        ops.upsample_residual(x, residual[:, :4])
    with pytest.raises(ValueError, match="x of at least one pixel"):
        ops.upsample_residual(x[:, :, :0], residual)
