"""Cost embedding: composed windows against two wide convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops.cost_embedding import FoldedCostEmbedding
from errseg.testing import assert_close, assert_within_eager_error, poisoned_memory
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("cost_embedding")
other_backends = on_backends("cost_embedding", without=("reference",))


SIZES: list[Any] = [
    Sizes(),
    Sizes(batch=1, classes=1, height=2, width=2),
    Sizes(height=20, width=3, channels=40),
]


@backends
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_published_order(sizes: Sizes, backend: str) -> None:
    call = sample("cost_embedding", sizes)
    got = call(backend=backend)
    assert got.is_contiguous()
    assert_close(got, published(call), 1e-13)


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("cost_embedding", Sizes(batch=1, classes=2, height=4, width=5, channels=3, embed=2)), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    call = sample("cost_embedding", Sizes(embed=64)).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@other_backends
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 24), (torch.float32, 136), *((t, 128) for t in HALF)])
def test_error_of_gradients_is_at_most_twice_eager(dtype: torch.dtype, channels: int, backend: str) -> None:
    whole = sample("cost_embedding", Sizes(batch=1, classes=2, height=9, width=11, channels=channels, embed=32))
    call = Sample(whole.function, (*whole.args[:2], whole.args[2].fold()), {}).to(dtype)
    got, eager = (gradients(lambda c, b=b: c(backend=b), call) for b in (backend, "reference"))
    right = gradients(lambda c: c(backend="reference"), call.to(torch.float64))
    for name, *grads in zip(("cost16", "cost32", *FoldedCostEmbedding._fields), got, eager, right, strict=True):
        assert_within_eager_error(*grads, name=name)


@other_backends
@pytest.mark.parametrize(
    ("high", "low"),
    [((11, 13), (4, 7)), ((6, 10), (13, 19)), ((9, 5), (1, 1)), ((1, 1), (3, 4)), ((1, 1), (1, 1))],
)
def test_low_maps_of_any_size(high: tuple[int, int], low: tuple[int, int], backend: str) -> None:
    costs = (torch.randn(1, 2, *size, dtype=torch.float64) for size in (high, low))
    weights = (torch.randn(5, 1, 7, 7, dtype=torch.float64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (*costs, *weights, torch.randn(5, dtype=torch.float64))]
    grad = torch.randn(1, 2, *high, 5, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for b in (backend, "reference"):
        with poisoned_memory():
            out = ops.cost_embedding(*leaves[:2], FoldedCostEmbedding(*leaves[2:]), backend=b)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, 1e-13)


@backends
def test_folded_parameters_serve_as_well(backend: str) -> None:
    call = sample("cost_embedding")
    folded = ops.cost_embedding(*call.args[:2], call.args[2].fold(), backend=backend)
    assert torch.equal(folded, call(backend=backend))


def test_weights_are_composed_in_float32() -> None:
    params = sample("cost_embedding").to(torch.bfloat16).args[2]
    assert {t.dtype for t in params.fold()} == {torch.float32}


def test_wrong_arguments_are_named() -> None:
    cost16, cost32, params = sample("cost_embedding").args
    with pytest.raises(ValueError, match=r"cost32 \[B, K, h, w\] like cost16, got \[2, 4, 3, 4\]"):
        ops.cost_embedding(cost16, cost32[:, :4], params)
    with pytest.raises(ValueError, match=r"cost32 of at least one pixel, got \[2, 5, 0, 4\]"):
        ops.cost_embedding(cost16, cost32[:, :, :0], params)
