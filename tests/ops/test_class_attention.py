"""Class attention: the whole class block against the published one, and the law of permuted classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error, rms_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("class_attention")


SIZES = [
    Sizes(),
    Sizes(batch=1, classes=1, height=2, width=3),
    Sizes(classes=65, height=4, width=4, channels=8),
    Sizes(classes=16, channels=24, heads=3),
]


@backends
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_published_order(sizes: Sizes, backend: str) -> None:
    call = sample("class_attention", sizes)
    got = call(backend=backend)
    assert got.is_contiguous()
    assert_close(got, published(call), 1e-13)


@backends
def test_gradients_equal_the_published_order(backend: str) -> None:
    call = sample("class_attention")
    run = [gradients(f, call) for f in (lambda c: c(backend=backend), published)]
    largest = max(g.abs().max() for g in run[1])
    for got, wanted in zip(*run, strict=True):
        # The bias of k is the same for every class: no influence, exactly zero here, rounding as published.
        if got.abs().max() == 0:
            assert wanted.abs().max() < 1e-13 * largest
        else:
            assert_close(got, wanted, 1e-11)


@backends
def test_gradients(backend: str) -> None:
    sizes = Sizes(batch=1, classes=3, height=4, width=3, channels=6, hidden=5)
    gradcheck(sample("class_attention", sizes), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    call = sample("class_attention", Sizes(classes=12, height=8, channels=32, hidden=96)).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_permuting_the_classes_permutes_the_output(dtype: torch.dtype, backend: str) -> None:
    x, text, params = sample("class_attention", Sizes(classes=11, heads=4)).to(dtype).args
    order = torch.randperm(11)
    straight = ops.class_attention(x, text, params, num_heads=4, backend=backend)
    permuted = ops.class_attention(x[:, order], text[:, order], params, num_heads=4, backend=backend)
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert rms_error(permuted, straight[:, order]) < tolerance
    assert rms_error(permuted, straight) > 0.1  # the permutation is seen


@backends
def test_each_branch_has_its_own_drop_path(backend: str) -> None:
    x, text, params = sample("class_attention").args
    ones = torch.ones(2, 3, 4, dtype=x.dtype)

    def run(masks: object) -> Tensor:
        return ops.class_attention(x, text, params, num_heads=2, drop_path=masks, backend=backend)

    kept, no_mlp, pooled = run((ones, ones)), run((ones, 0 * ones)), run(0 * ones)
    assert_close(kept, run(None), 1e-15)
    assert_close(run(ones), kept, 1e-15)
    assert_close(
        pooled,
        F.avg_pool3d(x.movedim(-1, 2).flatten(0, 1), (1, 2, 2)).unflatten(0, (2, 5)).movedim(2, -1),
        1e-15,
    )
    attention = no_mlp - pooled
    z = F.layer_norm(no_mlp, (16,), params.mlp.norm_weight, params.mlp.norm_bias)
    assert attention.abs().max() > 0.1 and z.isfinite().all()
    doubled = run((ones, 2 * ones))
    assert_close(doubled - no_mlp, 2 * (kept - no_mlp), 1e-13)


def test_wrong_arguments_are_named() -> None:
    x, text, params = sample("class_attention").args
    with pytest.raises(ValueError, match=r"text_guidance \[2, 5, 16\], got \[2, 4, 16\]"):
        ops.class_attention(x, text[:, :4], params, num_heads=2)
    with pytest.raises(ValueError, match=r"drop_path \[2, 3, 4\], got \[2, 5\]"):
        ops.class_attention(x, text, params, num_heads=2, drop_path=torch.ones(2, 5))
    with pytest.raises(ValueError, match="x of at least 2 x 2 pixels"):
        ops.class_attention(x[..., :1, :], text, params, num_heads=2)
