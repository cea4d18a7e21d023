"""Cosines: the full volume, the selected rows, gradients that reach only what was selected."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error, published_cost_volume
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, gradcheck, on_backends

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
    images, text, ids = call.args
    eager = published_cost_volume(images, text).gather(1, ids[:, :, None, None].expand(-1, -1, *images.shape[2:]))
    assert_within_eager_error(call(backend=backend), eager, call.to(torch.float64)(backend="reference"))


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
