"""Gated MLP: LayerNorm folded into two linears."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("gated_mlp")


@backends
@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(batch=1, classes=1, height=1, width=1), Sizes(channels=32, hidden=96)]
)
def test_equals_the_published_order(sizes: Sizes, backend: str) -> None:
    call = sample("gated_mlp", sizes)
    assert_close(call(backend=backend), published(call), 1e-13)
    for got, wanted in zip(gradients(lambda c: c(backend=backend), call), gradients(published, call), strict=True):
        assert_close(got, wanted, 1e-12)


@backends
def test_both_ends_of_the_gate_are_reached(backend: str) -> None:
    call = sample("gated_mlp")
    x, p = call.args
    gate = F.linear(F.layer_norm(x, x.shape[-1:], p.norm_weight, p.norm_bias), p.fc1_weight * 6, p.fc1_bias)
    assert gate.min() < 0 and gate.max() > 6
    wider = Sample(ops.gated_mlp, (x, ops.GatedMLPParams(**{**vars(p), "fc1_weight": p.fc1_weight * 6})), {})
    assert_close(wider(backend=backend), published(wider), 1e-13)


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("gated_mlp", Sizes(batch=1, classes=2, height=2, width=2, channels=6, hidden=5)), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    call = sample("gated_mlp", Sizes(channels=32, hidden=96)).to(dtype)
    assert_within_eager_error(call(backend=backend), published(call), call.to(torch.float64)(backend="reference"))


@backends
def test_takes_tokens_of_any_rank(backend: str) -> None:
    x, params = sample("gated_mlp").args
    flat = ops.gated_mlp(x.flatten(0, 3), params, backend=backend)
    assert torch.equal(flat.view_as(x), ops.gated_mlp(x, params, backend=backend))


def test_wrong_arguments_are_named() -> None:
    x, params = sample("gated_mlp").args
    with pytest.raises(ValueError, match=r"x \[..., 16\] floating, got \[2, 5, 7, 9, 15\] float64"):
        ops.gated_mlp(x[..., :15], params)
