"""Spatial attention: folded and split against the published block."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, interpreted, on_backends

backends = on_backends("spatial_attention")


SIZES = [
    Sizes(),
    Sizes(batch=1, classes=1, height=2, width=2),
    Sizes(height=3, width=14, channels=24, heads=3),
    Sizes(classes=2, channels=64, heads=1),
]


@backends
@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_published_order(sizes: Sizes, drop_path: bool, backend: str) -> None:
    call = sample("spatial_attention", sizes, drop_path=drop_path)
    assert_close(call(backend=backend), published(call), 1e-13)


@backends
@pytest.mark.parametrize(
    ("channels", "heads"), [(24, 3), (32, 4), (48, 3), (64, 2), (96, 3), (128, 2)], ids=lambda n: str(n)
)
def test_widths_of_channels_and_heads(channels: int, heads: int, backend: str) -> None:
    call = sample("spatial_attention", Sizes(batch=1, classes=1, height=3, width=4, channels=channels, heads=heads))
    assert_close(call(backend=backend), published(call), 1e-13)


@backends
def test_gradients_equal_the_published_order(backend: str) -> None:
    small = Sizes(classes=2, height=5, width=4) if interpreted("spatial_attention", backend) else Sizes()
    call = sample("spatial_attention", small)
    run = [gradients(f, call) for f in (lambda c: c(backend=backend), published)]
    largest = max(g.abs().max() for g in run[1])
    for got, wanted in zip(*run, strict=True):
        # Biases of k and norm_k have no influence: their gradient is exactly zero, the published one is rounding.
        if got.abs().max() == 0:
            assert wanted.abs().max() < 1e-13 * largest
        else:
            assert_close(got, wanted, 1e-11)


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("spatial_attention", Sizes(batch=1, classes=2, height=3, width=4, channels=6)), backend)


@backends
@pytest.mark.parametrize(("height", "width"), [(12, 11), (17, 19)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, height: int, width: int, backend: str) -> None:
    """Without gradients, where half precision may take another road."""
    call = sample("spatial_attention", Sizes(batch=1, height=height, width=width, channels=32)).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@backends
@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 13), *((dtype, 17) for dtype in HALF)])
def test_errors_of_gradients_are_at_most_twice_eager(dtype: torch.dtype, side: int, backend: str) -> None:
    """Several tiles of queries and of keys with remainders, an odd map, a dropped class; over two draws."""
    own, eager, exact = [], [], []
    for seed in (1, 3):
        sizes = Sizes(batch=1, classes=2, height=side, width=side + 2, channels=32)
        call = sample("spatial_attention", sizes, drop_path=True, seed=seed).to(dtype)
        assert set(call.kwargs["drop_path"].flatten().tolist()) == {0.0, 2.0}
        runs = lambda c: c(backend=backend), published, lambda c: c(backend="reference")
        calls = call, call, call.to(torch.float64)
        for found, run, inputs in zip((own, eager, exact), runs, calls, strict=True):
            found.append(gradients(run, inputs)[:-1])  # not that of the drop path, which is drawn
    stacked = ([torch.stack(draws) for draws in zip(*found, strict=True)] for found in (own, eager, exact))
    for got, wanted, reference in zip(*stacked, strict=True):
        if reference.any():
            assert_within_eager_error(got, wanted, reference)
        else:  # what the softmax cancels
            assert not got.any()


@backends
def test_a_dropped_class_stays_as_it_is(backend: str) -> None:
    call = sample("spatial_attention", Sizes(batch=1, classes=2, height=3, width=5), drop_path=True, seed=1)
    x = call.args[0].requires_grad_()
    dropped = call.kwargs["drop_path"] == 0
    assert dropped.any() and not dropped.all()
    result = call(backend=backend)
    assert torch.equal(result[dropped], x[dropped])
    grad = torch.randn_like(result)
    result.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad[dropped], grad[dropped]) and not torch.equal(x.grad[~dropped], grad[~dropped])


def test_means_are_removed_when_folding() -> None:
    folded = sample("spatial_attention").args[2].fold()
    for name in ("key_reduce_weight", "key_reduce_guidance_weight", "key_reduce_bias", "value_reduce_weight"):
        assert getattr(folded, name).sum(0).abs().max() < 1e-13


def test_wrong_arguments_are_named() -> None:
    x, guidance, params = sample("spatial_attention").args
    with pytest.raises(ValueError, match="num_heads that divides 16, got 3"):
        ops.spatial_attention(x, guidance, params, num_heads=3)
    with pytest.raises(ValueError, match=r"guidance \[2, 7, 9, 16\], got \[2, 7, 9, 15\]"):
        ops.spatial_attention(x, guidance[..., :15], params, num_heads=2)
    with pytest.raises(ValueError, match="x of at least 2 x 2 pixels"):
        ops.spatial_attention(x[:, :, :1], guidance[:, :1], params, num_heads=2)
