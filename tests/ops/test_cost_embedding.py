"""Cost embedding: composed windows against two wide convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, on_backends

backends = on_backends("cost_embedding")


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
