"""Cosines: the full volume, the selected rows, gradients that reach only what was selected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error, published_cost_volume
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import HALF, gradcheck, gradients, on_backends

backends = on_backends("cost_volume")


@backends
def test_golden_costs(golden, backend: str) -> None:
    for name in ("eval_small_io", "eval_nonsquare", "eval_odd"):
        g = golden(name)
        text = g["in.text"][:, 0].double()
        full = ops.cost_volume(g["in.feat_os16"].double(), text, backend=backend)
        assert_close(full, g["cost_all_os16"], 1e-7)
        for scale in ("os16", "os32"):
            cost = ops.cost_volume(g[f"in.feat_{scale}"].double(), text, g["indices"], backend=backend)
            assert_close(cost, g[f"cost_{scale}"], 1e-7)


@backends
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(classes=1), Sizes(batch=1, height=1, width=1), Sizes(text=1)])
def test_equals_gathering_from_the_volume(sizes: Sizes, backend: str) -> None:
    call = sample("cost_volume", sizes)
    images, text, ids = call.args
    volume = published_cost_volume(images, text)
    assert_close(
        call(backend=backend),
        volume.gather(1, ids[:, :, None, None].expand(-1, -1, *volume.shape[2:])),
        1e-14,
    )


@backends
def test_gradients(backend: str) -> None:
    gradcheck(sample("cost_volume", Sizes(height=3, width=2)), backend)


@backends
def test_only_selected_words_get_gradients(backend: str) -> None:
    images, text, ids = sample("cost_volume").args
    text.requires_grad_()
    ops.cost_volume(images, text, ids, backend=backend).square().sum().backward()
    assert text.grad is not None
    touched = text.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == ids.unique().tolist()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, backend: str) -> None:
    call = sample("cost_volume", Sizes(text=64)).to(dtype)
    assert_within_eager_error(call(backend=backend), _eager(call), call.to(torch.float64)(backend="reference"))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("sizes", [Sizes(text=67), Sizes(batch=1, classes=48, words=60, text=64), Sizes(classes=1)])
def test_gradients_err_at_most_twice_as_much_as_eager(dtype: torch.dtype, sizes: Sizes, backend: str) -> None:
    found: list[list[torch.Tensor]] = [[], [], []]
    for seed in range(2):  # a largest error is partly luck
        call = sample("cost_volume", replace(sizes, height=3, width=11), seed=seed).to(dtype)
        found[0] += gradients(lambda c: c(backend=backend), call)
        found[1] += gradients(_eager, call)
        found[2] += gradients(lambda c: c(backend="reference"), call.to(torch.float64))
    for i, name in enumerate(("images", "text")):
        ours, eager, truth = (torch.stack(grads[i::2]) for grads in found)
        assert_within_eager_error(ours, eager, truth, name=f"gradient of {name}")


def _eager(call: Sample) -> torch.Tensor:
    images, text, ids = call.args
    return published_cost_volume(images, text).gather(1, ids[:, :, None, None].expand(-1, -1, *images.shape[2:]))


@backends
def test_words_that_are_selected_twice_get_the_sum(backend: str) -> None:
    images, text, _ = sample("cost_volume", Sizes(batch=3, height=3, width=4)).args
    ids = torch.tensor([[4, 1, 4, 10], [1, 1, 1, 0], [4, 2, 0, 9]])
    wanted, found = (
        gradients(lambda c, b=b: c(backend=b), Sample(ops.cost_volume, (images, text, ids), {}))
        for b in ("reference", backend)
    )
    for got, right in zip(found, wanted, strict=True):
        assert_close(got, right, 1e-13)


@backends
def test_all_words_in_order_when_none_are_named(backend: str) -> None:
    images, text, _ = sample("cost_volume", Sizes(height=3, width=4)).args
    every = torch.arange(len(text)).expand(len(images), -1)
    calls = [Sample(ops.cost_volume, (images, text, ids), {}) for ids in (None, every)]
    assert torch.equal(calls[0](backend=backend), calls[1](backend=backend))
    for got, right in zip(*(gradients(lambda c: c(backend=backend), call) for call in calls), strict=True):
        assert_close(got, right, 1e-13)


@backends
@pytest.mark.parametrize(("image", "text"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_types_may_differ(image: torch.dtype, text: torch.dtype, backend: str) -> None:
    images, words, ids = sample("cost_volume", Sizes(height=3, width=4)).args
    call = Sample(ops.cost_volume, (images.to(image), words.to(text), ids), {})
    truth = call.to(torch.float64)
    found = [call(backend=backend), *gradients(lambda c: c(backend=backend), call)]
    wanted = [truth(backend="reference"), *gradients(lambda c: c(backend="reference"), truth)]
    assert [t.dtype for t in found] == [image, image, text]
    for got, right in zip(found, wanted, strict=True):
        assert_close(got, right, 1e-2)


@backends
def test_views_are_read_as_they_lie(backend: str) -> None:
    images, text, ids = sample("cost_volume", Sizes(height=4, width=6)).args
    views = [
        (images.to(memory_format=torch.channels_last), text.T.contiguous().T, ids.T.contiguous().T),
        (images.repeat_interleave(2, 3)[..., ::2], text.repeat(1, 2)[:, : text.shape[1]], ids),
    ]
    cotangent = torch.randn(2, 5, 4, 6, dtype=torch.float64)

    def grads(images: torch.Tensor, text: torch.Tensor, ids: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        leaves = images.requires_grad_(), text.requires_grad_()
        return torch.autograd.grad(ops.cost_volume(*leaves, ids, backend=backend), leaves, cotangent)

    for view in views:
        for got, right in zip(grads(*view, backend), grads(images, text, ids, "reference"), strict=True):
            assert_close(got, right, 1e-13)
    costs = ops.cost_volume(images[:1].expand(2, -1, -1, -1), text, ids, backend=backend)
    assert_close(costs, ops.cost_volume(images[:1].repeat(2, 1, 1, 1), text, ids, backend="reference"), 1e-13)


@backends
@pytest.mark.parametrize("sizes", [Sizes(batch=0), Sizes(classes=0)])
def test_nothing_to_compare(sizes: Sizes, backend: str) -> None:
    call = sample("cost_volume", sizes)
    assert call(backend=backend).numel() == 0
    assert all(g.abs().sum() == 0 for g in gradients(lambda c: c(backend=backend), call))


@backends
def test_zero_and_tiny_vectors_have_the_gradients_of_the_clamp(backend: str) -> None:
    """Shorter than 1e-12 a length is constant, and the vector's gradient not projected."""
    images, text, ids = (t.clone() for t in sample("cost_volume", Sizes(height=2, width=3)).args)
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, images[:, :, 0, 1] * 1e-14
    text[ids[0, 0]], text[ids[0, 1]] = 0, text[ids[0, 1]] * 1e-15
    call = Sample(ops.cost_volume, (images, text, ids), {})
    wanted, found = (gradients(lambda c, b=b: c(backend=b), call) for b in ("reference", backend))
    for got, right in zip(found, wanted, strict=True):
        scale = right.abs().flatten(1).amax(1) if right.ndim == 2 else right.abs().amax((0, 1))
        assert ((got - right).abs() <= 1e-12 * (scale[:, None] if right.ndim == 2 else scale)).all()


@backends
def test_zero_vectors_cost_zero(backend: str) -> None:
    images, text = torch.zeros(1, 4, 2, 2), torch.zeros(3, 4)
    assert ops.cost_volume(images, text, backend=backend).abs().max() == 0


def test_wrong_arguments_are_named() -> None:
    images, text = torch.randn(2, 4, 3, 3), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"expected class_ids \[2, K\] int64, got \[2, 48\] float32"):
        ops.cost_volume(images, text, torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"text_embeddings \[T, 4\], got \[5, 3\]"):
        ops.cost_volume(images, text[:, :3])
