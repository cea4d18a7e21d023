"""Class attention: the whole class block against the published one, and the law of permuted classes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error, rms_error
from errseg.testing.memory import assert_no_allocation_larger_than
from errseg.testing.published_ops import published
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, interpreted, on_backends

backends = on_backends("class_attention")


SIZES = [
    Sizes(),
    Sizes(batch=1, classes=1, height=2, width=3),
    Sizes(classes=65, height=4, width=4, channels=8),
    Sizes(classes=16, channels=24, heads=3),
    Sizes(batch=1, classes=3, height=4, width=5, channels=10, hidden=21),
]
NUMBERS_OF_CLASSES = (1, 2, 7, 16, 24, 32, 48, 64, 65, 171, 847)


def assert_gradients_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """The bias of k is the same for every class: no influence, exactly zero here, rounding as published."""
    largest = max(g.abs().max() for g in wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        if ours is None:
            continue  # a mask
        if ours.abs().max() == 0:
            assert theirs.abs().max() < 1e-13 * largest
        else:
            assert_close(ours, theirs, tolerance)


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
    assert_gradients_close(gradients(lambda c: c(backend=backend), call), gradients(published, call), 1e-11)


@backends
@pytest.mark.parametrize("classes", NUMBERS_OF_CLASSES)
def test_any_number_of_classes(classes: int, backend: str) -> None:
    """One pooled pixel of a map with both sides odd; two where there are few classes."""
    width = 5 if classes <= 65 else 3
    call = sample("class_attention", Sizes(1, classes, height=3, width=width, channels=8, heads=1, hidden=4))
    call.kwargs["drop_path"] = torch.full((1, 1, width // 2), 2.0), torch.full((1, 1, width // 2), 0.5)
    assert_close(call(backend=backend), published(call), 1e-13)
    if classes > 500 and interpreted("class_attention", backend):
        return  # a quarter of a minute; verify has the row
    assert_gradients_close(gradients(lambda c: c(backend=backend), call), gradients(published, call), 1e-10)


@backends
@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize(("channels", "heads"), [(32, 4), (24, 2), (40, 1), (64, 1)])
def test_widths_of_channels_and_heads(channels: int, heads: int, classes: int, backend: str) -> None:
    call = sample("class_attention", Sizes(1, classes, height=2, width=2, channels=channels, heads=heads, hidden=20))
    assert_close(call(backend=backend), published(call), 1e-13)
    assert_gradients_close(gradients(lambda c: c(backend=backend), call), gradients(published, call), 1e-11)


@backends
@pytest.mark.parametrize("classes", [5, 20])
def test_gradients_under_drop_path(classes: int, backend: str) -> None:
    """Branches dropped pixel by pixel, on maps whose last row and column the pooling leaves out."""
    sizes = Sizes(classes=classes, height=5, width=5, channels=8, hidden=6)
    call = sample("class_attention", sizes, drop_path=True)
    found = gradients(lambda c: c(backend=backend), call)
    assert_gradients_close(found, gradients(published, call), 1e-11)
    assert (found[0][:, :, -1] == 0).all() and (found[0][:, :, :, -1] == 0).all()


@backends
def test_gradients(backend: str) -> None:
    sizes = Sizes(batch=1, classes=3, height=4, width=3, channels=6, hidden=5)
    gradcheck(sample("class_attention", sizes), backend)


def far_from_kinks(arguments: list[Any]) -> list[Any]:
    """The same raw arguments with every ReLU6 below 0, inside, or above 6 by more than rounding can move it."""
    changed = dict(zip(ops.FoldedGatedMLP._fields, arguments[9:15], strict=True))
    ends = torch.tensor([-3.0, 3.0, 9.0], dtype=torch.float64)
    for name, share in (("gate", 4), ("out", 8)):
        changed[f"{name}_weight"] = changed[f"{name}_weight"] / share
        changed[f"{name}_bias"] = ends.repeat(len(changed[f"{name}_bias"]) // 3 + 1)[: len(changed[f"{name}_bias"])]
    arguments = [*arguments[:9], *changed.values(), *arguments[15:]]
    kinks = []

    def recorded(x: Tensor) -> Tensor:
        kinks.append(min(x.abs().min(), (x - 6).abs().min()))
        return x.clamp(0, 6)

    with patch.object(F, "relu6", recorded):
        raw(arguments, "reference")
    assert len(kinks) == 2 and min(kinks) > 0.1
    return arguments


def raw(arguments: list[Any], backend: str) -> Tensor:
    return ops.OPS["class_attention"](*arguments, backend=backend)


@backends
@pytest.mark.parametrize("classes", [12, 65])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, classes: int, backend: str) -> None:
    sizes = Sizes(1, classes, height=8 if classes < 20 else 2, width=4, channels=32, hidden=48)
    call = sample("class_attention", sizes).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@backends
@pytest.mark.parametrize("classes", [12, 65])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_errors_of_gradients_are_at_most_twice_eager(dtype: torch.dtype, classes: int, backend: str) -> None:
    """Of every argument of the raw op: folding is the same for all."""
    sizes = Sizes(1, classes, height=8 if classes < 20 else 2, width=4, channels=32, hidden=48)
    exact = far_from_kinks(list(sample("class_attention", sizes, drop_path=True).raw_arguments()))
    rounded = [a.to(dtype) if isinstance(a, Tensor) else a for a in exact]
    exact = [a.to(torch.float64) if isinstance(a, Tensor) else a for a in rounded]
    differentiable = ops.OPS["class_attention"].differentiable
    cotangent = torch.randn(1, classes, sizes.height // 2, 2, 32).bfloat16()
    grads = []
    for arguments, name in ((rounded, backend), (rounded, "reference"), (exact, "reference")):
        leaves = [a.detach().clone().requires_grad_() for a in arguments[: len(differentiable)]]
        result = raw([*leaves, *arguments[len(differentiable) :]], name)
        grads.append(torch.autograd.grad(result, leaves, cotangent.to(result.dtype)))
    for name, *found in zip(differentiable, *grads, strict=True):
        assert_within_eager_error(*found, name=name)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("classes", [11, 33])
def test_permuting_the_classes_permutes_the_output(dtype: torch.dtype, classes: int, backend: str) -> None:
    sizes = Sizes(classes=classes, heads=4) if classes < 20 else Sizes(1, classes, height=2, width=4, heads=1)
    x, text, params = sample("class_attention", sizes).to(dtype).args
    order = torch.randperm(classes)
    straight = ops.class_attention(x, text, params, num_heads=sizes.heads, backend=backend)
    permuted = ops.class_attention(x[:, order], text[:, order], params, num_heads=sizes.heads, backend=backend)
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


@on_backends("class_attention", without=("reference", "cpu"))
def test_hidden_units_stay_on_chip(backend: str) -> None:
    """Forward makes nothing larger than the pooled map, backward nothing like [B, K, H, W, hidden]."""
    sizes = Sizes(batch=1, classes=6, height=8, width=8, channels=8, heads=1, hidden=64)
    arguments = [
        a.requires_grad_() if isinstance(a, Tensor) else a for a in sample("class_attention", sizes).raw_arguments()
    ]
    pooled_bytes = 6 * 4 * 4 * 8 * arguments[0].element_size()
    with assert_no_allocation_larger_than(pooled_bytes):
        result = raw(arguments, backend)
    assert result.nbytes == pooled_bytes
    with assert_no_allocation_larger_than(6 * 8 * 8 * 64 * arguments[0].element_size() // 2):
        result.sum().backward()
