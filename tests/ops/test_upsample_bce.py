"""Loss: golden value and gradient, the dense twin, missing and ignored pixels."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.model.decoder import DecoderOutput
from errseg.testing import assert_close, published_loss
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, interpreted, on_backends

backends = on_backends("upsample_bce")


def small(backend: str) -> Sizes:
    return Sizes(height=3, width=4) if interpreted("upsample_bce", backend) else Sizes()


@backends
def test_golden_loss(golden, backend: str) -> None:
    g = golden("loss_post")
    logits = g["loss.logits"].double().requires_grad_()
    loss = ops.upsample_bce(logits, g["loss.indices"], g["loss.targets"], vocabulary_size=12, backend=backend)
    loss.backward()
    assert logits.grad is not None
    assert_close(loss, g["loss.value"], 1e-12)
    assert_close(logits.grad, g["loss.grad_logits"], 1e-12)


@backends
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=1, classes=1, words=1), Sizes(classes=11)])
def test_equals_the_dense_loss(sizes: Sizes, backend: str) -> None:
    call = sample("upsample_bce", sizes)
    logits, ids, target = call.args
    dense = DecoderOutput(logits, ids).dense(sizes.words)
    assert_close(call(backend=backend), published_loss(dense, target, 255), 1e-12)


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("upsample_bce", Sizes(height=3, width=4)), backend)


@backends
def test_a_missed_class_costs_a_hundred_per_pixel(backend: str) -> None:
    logits, ids = torch.full((1, 1, 2, 2), -50.0), torch.tensor([[3]])
    target = torch.tensor([[[3, 1], [255, 3]]], dtype=torch.uint8)
    loss = ops.upsample_bce(logits, ids, target, vocabulary_size=5, backend=backend)
    assert loss.item() == pytest.approx((100 + 2 * 50) / (4 * 5))


@backends
def test_ignored_pixels_count_as_negative_or_not_at_all(backend: str) -> None:
    logits, ids, target = sample("upsample_bce", small(backend)).args
    nothing = torch.full_like(target, 255)
    softplus = torch.nn.functional.softplus(
        torch.nn.functional.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    )
    loss = ops.upsample_bce(logits, ids, nothing, vocabulary_size=11, backend=backend)
    assert_close(loss, softplus.sum() / (nothing.numel() * 11), 1e-12)
    kwargs = {"vocabulary_size": 11, "exclude_ignored": True, "backend": backend}
    assert ops.upsample_bce(logits, ids, nothing, **kwargs) == 0
    half = target.clone()
    half[:, : target.shape[1] // 2] = 255
    included = ops.upsample_bce(logits, ids, half, vocabulary_size=11, backend=backend) * half.numel()
    excluded = ops.upsample_bce(logits, ids, half, **kwargs) * (half != 255).sum()
    assert_close(included - excluded, (softplus * (half == 255)[:, None]).sum() / 11, 1e-12)


@backends
def test_values_outside_the_vocabulary_count_as_ignored(backend: str) -> None:
    logits, ids, target = sample("upsample_bce", small(backend)).args
    strange = target.where(target != 255, -1)
    stranger = target.where(target != 255, 11)
    losses = [
        ops.upsample_bce(logits, ids, t, vocabulary_size=11, backend=backend) for t in (target, strange, stranger)
    ]
    assert losses[0] == losses[1] == losses[2]


@backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_type(dtype: torch.dtype, backend: str) -> None:
    logits, ids, target = sample("upsample_bce", small(backend)).args
    losses = [ops.upsample_bce(logits, ids, t, vocabulary_size=11, backend=backend) for t in (target, target.to(dtype))]
    assert losses[0] == losses[1]


@backends
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype, backend: str) -> None:
    call = sample("upsample_bce").to(dtype)
    loss = call(backend=backend)
    assert loss.dtype == torch.float32
    assert_close(loss, call.to(torch.float64)(backend="reference"), 1e-6)


def test_wrong_arguments_are_named() -> None:
    logits, ids, target = sample("upsample_bce").args
    with pytest.raises(ValueError, match=r"target \[B, H, W\] integer, got .* float32"):
        ops.upsample_bce(logits, ids, target.float(), vocabulary_size=11)
    with pytest.raises(ValueError, match="vocabulary_size of at least K = 5, got 4"):
        ops.upsample_bce(logits, ids, target, vocabulary_size=4)
