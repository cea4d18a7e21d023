"""Depthwise convolution: token-major against PyTorch's grouped convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error
from errseg.testing.published_ops import published
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("depthwise_conv")
SHAPES = {
    "odd": Sizes(),
    "one pixel": Sizes(classes=2, height=1, width=1, channels=24),
    "smaller than the window": Sizes(batch=1, classes=3, height=2, width=3, channels=3),
    "one channel": Sizes(batch=1, classes=2, height=9, width=8, channels=1),
    "channels": Sizes(batch=1, classes=2, height=5, width=6, channels=136),
    "published channels": Sizes(batch=1, classes=1, height=9, width=10, channels=128),
    "strips": Sizes(batch=1, classes=1, height=29, width=9, channels=8),
    "columns": Sizes(batch=1, classes=1, height=3, width=101, channels=20),
}


@backends
@pytest.mark.parametrize("drop_path", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=1, classes=1, height=1, width=2), Sizes(height=17, width=8)])
def test_equals_the_published_order(sizes: Sizes, drop_path: bool, backend: str) -> None:
    call = sample("depthwise_conv", sizes, drop_path=drop_path)
    got = call(backend=backend)
    assert got.is_contiguous()
    assert_close(got, published(call), 1e-13)
    run = [gradients(f, call)[:4] for f in (lambda c: c(backend=backend), published)]
    for mine, wanted in zip(*run, strict=True):
        assert_close(mine, wanted, 1e-13)


@backends
def test_gradients(backend: str) -> None:
    call = sample("depthwise_conv", Sizes(batch=1, classes=2, height=4, width=3, channels=3))
    gradcheck(call, backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_error_is_at_most_twice_eager(sizes: Sizes, dtype: torch.dtype, backend: str) -> None:
    call = sample("depthwise_conv", sizes, drop_path=True).to(dtype)
    truth = call.to(torch.float64)
    assert_within_eager_error(call(backend=backend), published(call), truth(backend="reference"))
    mine, eager, exact = (
        gradients(run, c)[:4]
        for run, c in ((lambda c: c(backend=backend), call), (published, call), (published, truth))
    )
    for name, of_mine, of_eager, wanted in zip(("x", "weight", "bias", "residual"), mine, eager, exact, strict=True):
        assert of_mine.dtype == dtype
        assert_within_eager_error(of_mine, of_eager, wanted, name=name)


@backends
@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_bias_and_residual_are_optional_and_windows_odd(size: int, backend: str) -> None:
    x = sample("depthwise_conv").args[0]
    weight = torch.randn(x.shape[-1], 1, size, size, dtype=x.dtype)

    def plain(call: Sample) -> torch.Tensor:
        x, weight = call.args
        return ops.depthwise_conv(x, weight, backend=backend)

    def eager(call: Sample) -> torch.Tensor:
        x, weight = call.args
        return published(Sample(ops.depthwise_conv, (x, weight, None, torch.zeros_like(x), None), {}))

    call = Sample(ops.depthwise_conv, (x, weight), {})
    assert_close(plain(call), eager(call), 1e-13)
    for mine, wanted in zip(gradients(plain, call), gradients(eager, call), strict=True):
        assert_close(mine, wanted, 1e-13)


@backends
def test_dropped_classes_pass_the_residual_on(backend: str) -> None:
    x, weight, bias, residual, _ = sample("depthwise_conv").args
    mask = torch.ones(x.shape[:2], dtype=x.dtype)
    mask[1, 3] = 0
    out = ops.depthwise_conv(x.requires_grad_(), weight, bias, residual, mask, backend=backend)
    assert torch.equal(out[1, 3], residual[1, 3])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad[1, 3] == 0).all() and (grad[1, 2] != 0).any()


@backends
def test_reads_views_and_gradients_of_any_layout(backend: str) -> None:
    call = sample("depthwise_conv", drop_path=True)
    viewed = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    shifted = call.map(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))  # no longer aligned
    channels_first = call.map(lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1))
    wanted = [call(backend=backend), *gradients(lambda c: c(backend=backend), call)[:4]]
    for other in (viewed, shifted, channels_first):
        got = [other(backend=backend), *gradients(lambda c: c(backend=backend), other)[:4]]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    x, *rest = call.args
    out = ops.depthwise_conv(x.requires_grad_(), *rest, backend=backend)
    expanded = torch.ones((), dtype=x.dtype).expand(out.shape)  # what the gradient of a sum looks like
    pair = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (expanded, expanded.contiguous())]
    assert torch.equal(*pair)


@backends
def test_every_gradient_can_be_had_alone(backend: str) -> None:
    args = sample("depthwise_conv", drop_path=True).args
    every: list[torch.Tensor] = []
    for alone in ((0, 1, 2, 3), (0,), (1,), (2,), (3,)):
        call = [t.detach().clone().requires_grad_(i in alone) for i, t in enumerate(args)]
        out = ops.depthwise_conv(*call, backend=backend)
        grads = torch.autograd.grad(out, [call[i] for i in alone], args[0])
        every = every or list(grads)
        for i, grad in zip(alone, grads, strict=True):
            assert_close(grad, every[i], 1e-13)


@on_backends("depthwise_conv", without=("reference",))
def test_neither_bias_nor_residual_is_kept_for_the_backward_pass(backend: str) -> None:
    call = sample("depthwise_conv", drop_path=True).map(lambda t: t.requires_grad_())
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(backend=backend)
    x, weight, *_, mask = call.args
    assert sorted(kept) == sorted([*(t.untyped_storage().nbytes() for t in (x, weight, mask)), 8, 8])


@on_backends("depthwise_conv", without=("reference",))
def test_a_residual_of_another_dtype_is_left_to_the_reference(backend: str) -> None:
    x, weight, bias, residual, _ = sample("depthwise_conv").to(torch.bfloat16).args
    with pytest.raises(ops.BackendError, match=r"x and residual of one dtype, got .* bfloat16 and .* float32"):
        ops.depthwise_conv(x, weight, bias, residual.float(), backend=backend)
    assert ops.depthwise_conv(x, weight, bias, residual.float()).dtype == torch.float32


@on_backends("depthwise_conv", without=("reference",))
def test_weights_may_be_wider_than_the_maps(backend: str) -> None:
    call = sample("depthwise_conv").to(torch.bfloat16)
    x, weight, bias, residual, _ = (t.detach().requires_grad_() if t is not None else t for t in call.args)
    wide = [t.detach().float().requires_grad_() for t in (weight, bias)]
    out = ops.depthwise_conv(x, *wide, residual, backend=backend)
    assert torch.equal(out, call(backend=backend))
    grads = [
        torch.autograd.grad(ops.depthwise_conv(x, *w, residual, backend=backend).sum(), w)
        for w in (wide, (weight, bias))
    ]
    for of_wide, narrow in zip(*grads, strict=True):
        assert of_wide.dtype == torch.float32 and torch.equal(of_wide.bfloat16(), narrow)


@pytest.mark.skipif(ops.OPS["depthwise_conv"].why_not("cpu") is not None, reason="no C++ library")
@pytest.mark.parametrize("sizes", [SHAPES["strips"], SHAPES["columns"], SHAPES["channels"]], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(sizes: Sizes) -> None:
    call = sample("depthwise_conv", sizes, drop_path=True).to(torch.float32)
    before, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append([call(backend="cpu"), *gradients(lambda c: c(backend="cpu"), call)[:4]])
    finally:
        torch.set_num_threads(before)
    for made in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made, seen[0], strict=True))


def test_the_reference_goes_through_many_maps_in_parts_for_the_gradient_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight requires its gradient under no_grad too, where nothing is summed."""
    call = sample("depthwise_conv", Sizes(batch=3, classes=6, height=3, width=4, channels=2))
    call = call.map(lambda t: t.requires_grad_())
    convolved: list[int] = []
    conv2d = torch.nn.functional.conv2d

    def counted(image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        convolved.append(len(image))
        return conv2d(image, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    trained = call(backend="reference")
    assert convolved == [16, 2]
    with torch.no_grad():
        assert_close(call(backend="reference"), trained, 1e-15)
    assert convolved == [16, 2, 18]


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, residual, _ = sample("depthwise_conv").args
    with pytest.raises(ValueError, match=r"weight \[16, 1, k, k\] with k odd, got \[16, 1, 6, 6\]"):
        ops.depthwise_conv(x, weight[..., :6, :6])
    with pytest.raises(ValueError, match=r"residual \[2, 5, 7, 9, 16\], got \[1, 5, 7, 9, 16\]"):
        ops.depthwise_conv(x, weight, bias, residual[:1])
    with pytest.raises(ValueError, match=r"drop_path \[2, 5\], got \[5, 2\]"):
        ops.depthwise_conv(x, weight, bias, residual, torch.ones(5, 2))
