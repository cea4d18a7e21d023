"""Class attention in Triton: slabs of pixels, compilation, NaN, what it cannot take."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops import class_slabs, triton_backend
from errseg.testing import assert_close
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import gradients

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
SIZES = Sizes(batch=3, height=4, width=6, channels=8, heads=1, hidden=4)  # 6 pixels of an image
TILED, STREAMED = 3, 33  # classes, of which a tile holds 16 in float64
SLABS = {(TILED, 1): 18, (TILED, 5): 6, (TILED, 13): 2, (STREAMED, 5): 6}  # with so many pixels


def made(sizes: Sizes, dtype: torch.dtype = torch.float64, drop_path: bool = True) -> Sample:
    return sample("class_attention", sizes, drop_path=drop_path).to(dtype).map(lambda t: t.to(DEVICE))


def raw(sizes: Sizes, dtype: torch.dtype = torch.float32) -> list[Any]:
    arguments = made(sizes, dtype).raw_arguments()
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]


@functools.cache
def in_one_slab(classes: int) -> list[Tensor]:
    return gradients(lambda call: call(backend="triton"), made(replace(SIZES, classes=classes)))


@pytest.mark.parametrize(("classes", "pixels"), SLABS)
def test_slabs_of_pixels_give_the_same_gradients(classes: int, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of an image, and several images at once where a tile holds the classes."""
    wanted = in_one_slab(classes)
    arrays = 6 if classes == TILED else 13
    pixel_bytes = arrays * classes * SIZES.channels * torch.float64.itemsize
    monkeypatch.setattr(triton_backend._kernels("class_attention"), "SLAB_BYTES", pixels * pixel_bytes + 99)
    slabs: list[slice] = []
    add = class_slabs.AttentionSums.add

    def counted(self: class_slabs.AttentionSums, images: slice, *rest: Tensor) -> None:
        slabs.append(images)
        add(self, images, *rest)

    monkeypatch.setattr(class_slabs.AttentionSums, "add", counted)
    found = gradients(lambda call: call(backend="triton"), made(replace(SIZES, classes=classes)))
    assert len(slabs) == SLABS[classes, pixels]
    largest = max(t.abs().max() for t in wanted if t is not None)
    for got, whole in zip(found, wanted, strict=True):
        if got is None:  # a mask
            assert whole is None
        elif whole.abs().max() < 1e-12 * largest:  # what the softmax cancels
            assert got.abs().max() < 1e-12 * largest
        else:
            assert_close(got, whole, 1e-12)


@pytest.mark.parametrize("height", [2, 3])
def test_opcheck(height: int) -> None:
    op = ops.OPS["class_attention"]
    arguments = raw(Sizes(batch=1, classes=2, height=height, width=4, channels=8, hidden=4))
    leaves = [t.requires_grad_() for t in arguments[: len(op.differentiable)]]
    torch.library.opcheck(op.overload, (*leaves, *arguments[len(leaves) :], "triton"))


@pytest.mark.parametrize("name", ["mlp_gate_bias", "mlp_out_bias"])
@pytest.mark.parametrize("classes", [5, 70])
def test_nan_is_not_hidden_by_the_clips(classes: int, name: str) -> None:
    op = ops.OPS["class_attention"]
    arguments = raw(Sizes(batch=1, classes=classes, height=2, width=2, channels=8, heads=1, hidden=4))
    arguments[op.differentiable.index(name)][0] = float("nan")
    got, wanted = (op(*arguments, backend=backend).isnan() for backend in ("triton", "reference"))
    assert torch.equal(got, wanted) and wanted[..., 0].all() and wanted.all() == (name == "mlp_gate_bias")


def test_what_it_cannot_take_is_named() -> None:
    small = Sizes(batch=1, classes=1, height=2, width=2, hidden=4)
    with pytest.raises(ops.BackendError, match="up to 256 channels, got 260"):
        made(replace(small, channels=260, heads=10))(backend="triton")
    with pytest.raises(ops.BackendError, match="heads of up to 64 channels, got 128"):
        made(replace(small, channels=128, heads=1))(backend="triton")
    x, *rest = raw(small)
    wide = x[..., :1, :1, :].expand(1, 1, 16384, 8192, 16)
    assert ops.OPS["class_attention"].why_not("triton", wide, *rest) == (
        "images of less than 2**31 numbers, got 2147483648"
    )
