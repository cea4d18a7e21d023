"""A step of the up-decoder: composed weights against upsampling, concatenation and convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, of_same_size, sample
from errseg.verify.runner import exact_arithmetic
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("up_step")
kinds = pytest.mark.parametrize("kind", ["double", "same"])
SIZES: list[Any] = [
    Sizes(classes=2, height=3, width=5),
    Sizes(batch=1, classes=1, height=1, width=1, channels=32),
    Sizes(batch=1, classes=2, height=1, width=10, channels=5),
    Sizes(batch=1, classes=1, height=5, width=2, channels=35),
]
MANY_TILES = Sizes(batch=1, classes=1, height=5, width=9)  # several across and down in float64, the last ones not full


def made(kind: str, sizes: Sizes | None = None) -> Sample:
    call = sample("up_step", sizes)
    return of_same_size(call) if kind == "same" else call


@backends
@kinds
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_published_order(sizes: Sizes, kind: str, backend: str) -> None:
    call = made(kind, sizes)
    got = call(backend=backend)
    assert got.is_contiguous()
    assert_close(got, published(call), 1e-12)


@backends
@kinds
def test_every_tile_and_phase_counts(kind: str, backend: str) -> None:
    """Each is written, and each has its part in mean and variance of the whole map."""
    call = made(kind, MANY_TILES)
    assert_close(call(backend=backend), published(call), 1e-12)


@backends
@kinds
def test_gradients_equal_those_of_the_published_order(kind: str, backend: str) -> None:
    """Of the tokens, the guidance, and every published tensor through the composition."""
    call = made(kind, Sizes(batch=2, classes=2, height=2, width=3))
    mine, theirs = gradients(lambda c: c(backend=backend), call), gradients(published, call)
    assert len(mine) == 10
    for got, wanted in zip(mine, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        assert_close(got, wanted, 1e-10)


@on_backends("up_step", without=("triton",))  # whose gradients are the reference's
@kinds
def test_gradients(kind: str, backend: str) -> None:
    gradcheck(made(kind, Sizes(batch=1, classes=2, height=3, width=4, channels=3)), backend)


@backends
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, kind: str, backend: str) -> None:
    call = made(kind, Sizes(batch=1, classes=1, height=5, width=9, channels=64)).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), published(call.to(torch.float64)))


@backends
def test_error_of_gradients_is_at_most_twice_eager(backend: str) -> None:
    call = made("double", Sizes(batch=1, classes=2, height=3, width=4, channels=32)).to(torch.float32)
    runs = (lambda c: c(backend=backend), call), (published, call), (published, call.to(torch.float64))
    with exact_arithmetic():  # where the gradients are made by cuDNN, too
        found = [gradients(f, c) for f, c in runs]
    for mine, eager, exact in zip(*found, strict=True):
        assert_within_eager_error(mine, eager, exact)


@backends
@kinds
def test_a_large_mean_does_not_cancel_the_variance(kind: str, backend: str) -> None:
    """A mean of a hundred deviations: float32 squares about zero would leave three digits of the variance."""
    x, added, *rest = made(kind, MANY_TILES).to(torch.float32).raw_arguments()
    exact = [a.double() if isinstance(a, Tensor) else a for a in (x, added + 100, *rest)]
    rounded = [a.float() if isinstance(a, Tensor) else a for a in exact]
    truth, eager = ops.OPS["up_step"](*exact, backend="reference"), ops.OPS["up_step"](*rounded, backend="reference")
    assert_within_eager_error(ops.OPS["up_step"](*rounded, backend=backend), eager, truth)
    assert_close(eager, truth, 1e-4)


@backends
@kinds
def test_epsilon_reaches_both_norms(kind: str, backend: str) -> None:
    call = made(kind, Sizes(batch=1, classes=1, height=2, width=3))
    x, guidance, params = call.args
    results = [
        [ops.up_step(1e-3 * x, 1e-3 * guidance, params, eps=eps, backend=b) for b in (backend, "reference")]
        for eps in (1e-5, 0.3)
    ]
    for got, wanted in results:
        assert_close(got, wanted, 1e-12)
    assert not torch.allclose(results[0][0], results[1][0])


@backends
@kinds
def test_folded_parameters_serve_as_well(kind: str, backend: str) -> None:
    call = made(kind, Sizes(batch=1, classes=1, height=2, width=3))
    folded = ops.up_step(*call.args[:2], call.args[2].fold(), backend=backend)
    assert torch.equal(folded, call(backend=backend))


@kinds
def test_weights_are_composed_in_float32(kind: str) -> None:
    folded = made(kind).to(torch.bfloat16).args[2].fold()
    assert folded.weight1.dtype == folded.shared_weight.dtype == torch.float32
    assert folded.weight1.shape == ((8, 8, 3, 3) if kind == "same" else (2, 2, 8, 16, 2, 2))
    assert (folded.up_weight is None) == (kind == "double")


def test_wrong_arguments_are_named() -> None:
    x, guidance, params = made("double").args
    with pytest.raises(ValueError, match=r"guidance \[2, 5, 14, 18\], got \[2, 5, 7, 9\]"):
        ops.up_step(x, guidance[:, :, :7, :9], params)
    with pytest.raises(ValueError, match=r"x \[B, K, H, W, 16\] floating, got \[2, 5, 7, 9, 15\]"):
        ops.up_step(x[..., :15], guidance, params)
    with pytest.raises(ValueError, match="x of at least one pixel"):
        ops.up_step(x[:, :, :0], guidance[:, :, :0], params)
    x, guidance, params = made("same").args
    with pytest.raises(ValueError, match=r"guidance \[2, 5, 7, 9\], got \[2, 4, 7, 9\]"):
        ops.up_step(x, guidance[:, :4], params)
    weights = {name: t[:7] for name, t in vars(params).items()}
    weights |= {"conv1_weight": params.conv1_weight[:7, 1:], "conv2_weight": params.conv2_weight[:7, :7]}
    with pytest.raises(ValueError, match="C' a multiple of 8, got 7"):
        ops.up_step(x, guidance, ops.UpStepParams(**weights))
