"""Gated MLP: LayerNorm folded into two linears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from errseg import ops
from errseg.testing import assert_absolutely_close, assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, interpreted, on_backends

backends = on_backends("gated_mlp")


def gate_of(call: Sample) -> torch.Tensor:
    """What enters the ReLU6, float64."""
    x, p = call.to(torch.float64).args
    return F.linear(F.layer_norm(x, x.shape[-1:], p.norm_weight, p.norm_bias), p.fc1_weight, p.fc1_bias)


def with_params(call: Sample, **changed: torch.Tensor) -> Sample:
    """The same call with some of its weights replaced."""
    x, params = call.args
    return Sample(ops.gated_mlp, (x, ops.GatedMLPParams(**{**vars(params), **changed})), {})


@backends
@pytest.mark.parametrize(
    "sizes", [Sizes(), Sizes(batch=1, classes=1, height=1, width=1), Sizes(channels=32, hidden=96)]
)
def test_equals_the_published_order(sizes: Sizes, backend: str) -> None:
    few = interpreted("gated_mlp", backend) and sizes.batch > 1
    call = sample("gated_mlp", replace(sizes, batch=1, classes=3, height=5) if few else sizes)
    assert_close(call(backend=backend), published(call), 1e-13)
    for got, wanted in zip(gradients(lambda c: c(backend=backend), call), gradients(published, call), strict=True):
        assert_close(got, wanted, 1e-12)


@backends
def test_both_ends_of_the_gate_are_reached(backend: str) -> None:
    call = sample("gated_mlp", Sizes(batch=1, classes=3, height=5))
    wider = with_params(call, fc1_weight=call.args[1].fc1_weight * 6)
    gate = gate_of(wider)
    assert gate.min() < 0 and gate.max() > 6
    assert_close(wider(backend=backend), published(wider), 1e-13)
    for got, wanted in zip(gradients(lambda c: c(backend=backend), wider), gradients(published, wider), strict=True):
        assert_close(got, wanted, 1e-12)


@backends
def test_tokens_without_variance_and_gates_at_their_very_ends(backend: str) -> None:
    """Where every token is constant a gate is its bias: at 0 and at 6 it passes no gradient, as in PyTorch."""
    x, params = sample("gated_mlp", Sizes(batch=1, classes=2, height=3, width=4)).args
    biases = torch.tensor([0.0, 6.0, 3.0], dtype=x.dtype).repeat(8)
    leaves = [x[..., :1].expand(x.shape).clone(), *params.fold()._replace(gate_bias=biases)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    wanted, got = (
        ops.gated_mlp(leaves[0], ops.FoldedGatedMLP(*leaves[1:]), backend=name) for name in ("reference", backend)
    )
    assert_close(got, wanted, 1e-13)
    grads = [torch.autograd.grad(result.square().sum(), leaves) for result in (wanted, got)]
    for name, expected, actual in zip(("x", *ops.FoldedGatedMLP._fields), *grads, strict=True):
        assert_absolutely_close(actual, expected, 1e-12 * max(1.0, expected.abs().max().item()), name)
    gate_bias = grads[1][2].view(8, 3)
    assert (gate_bias[:, :2] == 0).all() and (gate_bias[:, 2] != 0).all()


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("gated_mlp", Sizes(batch=1, classes=2, height=2, width=2, channels=6, hidden=5)), backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    """Also of every gradient, with each gate below 0, inside or above 6 by more than rounding can move it."""
    call = sample("gated_mlp", Sizes(batch=1, classes=4, channels=32, hidden=96))
    weight = (call.args[1].fc1_weight / 4).bfloat16().double()
    call = with_params(call, fc1_weight=weight, fc1_bias=torch.tensor([-3.0, 3.0, 9.0]).repeat(32)).to(dtype)
    gate = gate_of(call)
    assert min(gate.abs().min(), (gate - 6).abs().min()) > 0.1
    exact = call.to(torch.float64)
    assert_within_eager_error(call(backend=backend), published(call), exact(backend="reference"))
    results = (
        gradients(lambda c: c(backend=backend), call),
        gradients(published, call),
        gradients(lambda c: c(backend="reference"), exact),
    )
    for name, *found in zip(("x", *vars(call.args[1])), *results, strict=True):
        assert_within_eager_error(*found, name=name)


@backends
def test_takes_tokens_of_any_rank(backend: str) -> None:
    x, params = sample("gated_mlp").args
    flat = ops.gated_mlp(x.flatten(0, 3), params, backend=backend)
    assert torch.equal(flat.view_as(x), ops.gated_mlp(x, params, backend=backend))


def test_wrong_arguments_are_named() -> None:
    x, params = sample("gated_mlp").args
    with pytest.raises(ValueError, match=r"x \[..., 16\] floating, got \[2, 5, 7, 9, 15\] float64"):
        ops.gated_mlp(x[..., :15], params)
