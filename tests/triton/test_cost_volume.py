"""What the op tests of cost_volume do not reach: several tiles per axis, splits, layouts, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, assert_close, forbid_host_syncs, poisoned_memory
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import words_far_apart

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"


def raw_arguments(dtype: torch.dtype = torch.float32, *, all_words: bool = False) -> tuple[Any, ...]:
    images, text, ids = sample("cost_volume", Sizes(height=3, width=4)).to(dtype).args
    images, text = (t.to(DEVICE).requires_grad_() for t in (images, text))
    return images, text, None if all_words else ids.to(DEVICE)


def gradients(backend: str, images: Tensor, text: Tensor, ids: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Costs and both gradients; what is not written is NaN."""
    leaves = [t.detach().requires_grad_() for t in (images, text)]
    with poisoned_memory():
        costs = ops.cost_volume(*leaves, ids, backend=backend)
        return [costs.detach(), *torch.autograd.grad(costs, leaves, grad.to(costs.dtype))]


def check(images: Tensor, text: Tensor, ids: Tensor | None, tolerance: float) -> None:
    images, text = images.to(DEVICE), text.to(DEVICE)
    ids = None if ids is None else ids.to(DEVICE)
    batch, _, *size = images.shape
    grad = torch.randn(batch, len(text) if ids is None else ids.shape[1], *size, dtype=torch.float64, device=DEVICE)
    wanted = gradients("reference", images.double(), text.double(), ids, grad)
    for got, right in zip(gradients("triton", images, text, ids, grad), wanted, strict=True):
        assert_close(got, right, tolerance)


@pytest.mark.parametrize("all_words", [False, True])
def test_opcheck(all_words: bool) -> None:
    torch.library.opcheck(ops.OPS["cost_volume"].overload, (*raw_arguments(all_words=all_words), "triton"))


def test_a_compiled_loss_gives_the_eager_gradients() -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()  # so that the compiler meets the question, not the answer
    images, text, ids = raw_arguments()

    def loss(images: Tensor, text: Tensor) -> Tensor:
        return ops.cost_volume(images, text, ids, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(images, text), (images, text)) for f in (loss, compiled))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize(
    ("dtype", "sizes", "tolerance"),
    [
        (torch.float32, (67, 70, 5, 13), 1e-6),
        (torch.bfloat16, (67, 70, 5, 13), 1e-2),
        (torch.float64, (37, 33, 3, 7), 1e-13),
    ],
)
def test_several_tiles_of_words_pixels_and_channels(
    dtype: torch.dtype, sizes: tuple[int, ...], tolerance: float
) -> None:
    channels, classes, height, width = sizes  # each past a tile
    images, text = torch.randn(2, channels, height, width).to(dtype), torch.randn(90, channels).to(dtype)
    check(images, text, torch.stack([torch.randperm(90)[:classes] for _ in range(2)]), tolerance)


def test_all_words_of_a_large_batch() -> None:
    check(torch.randn(3, 12, 2, 4), torch.randn(70, 12), None, 1e-6)


def test_one_split_of_the_pixels_or_many() -> None:
    """Splits fill the GPU: a small image has as many as it has tiles, a large batch one for each image."""
    for batch, side in ((1, 17), (12, 2)):
        images, text = torch.randn(batch, 10, side, side), torch.randn(5, 10)
        check(images, text, torch.randint(5, (batch, 3)), 1e-6)


def test_channels_last_images_and_words_between_others_are_not_copied() -> None:
    images = torch.randn(2, 5, 6, 48).permute(0, 3, 1, 2)
    text = torch.randn(30, 100)[::2, 3:51]
    ids = torch.randint(15, (2, 4))
    check(images, text, ids, 1e-6)
    with AllocationSpy() as spy:
        ops.cost_volume(images.to(DEVICE), text.to(DEVICE), ids.to(DEVICE), backend="triton")
    assert spy.peak_bytes == 2 * 4 * 30 * 4 or DEVICE == "cuda"


def test_other_layouts() -> None:
    images = torch.randn(2, 10, 6, 8)
    ids = torch.randint(7, (4, 2)).T  # strided
    for layout in (images.mT, images[..., ::2], images[:1].expand(2, -1, -1, -1), images[..., :1]):
        check(layout, torch.randn(10, 7).T, ids, 1e-6)


def test_a_large_vocabulary_costs_its_zeros_and_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    from errseg.kernels import cost_volume as kernels

    if DEVICE == "cpu":  # the host function alone
        monkeypatch.setattr(type(kernels.CONFIGS["fwd torch.float32"]), "launch", lambda *arguments: None)
    images, text = torch.randn(2, 16, 8, 8, device=DEVICE), torch.randn(100_000, 16, device=DEVICE)
    ids = torch.randint(100_000, (2, 48), device=DEVICE)
    with forbid_host_syncs(), AllocationSpy() as spy:
        costs, *scales = kernels.forward(images, text, ids, True)
        kernels.backward(costs, images, text, ids, *scales, [True, True])
    assert text.nbytes <= spy.peak_bytes < text.nbytes + 300_000


def test_offsets_beyond_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = torch.UntypedStorage.copy_

    def copy_unless_same(self: Any, source: Any, *arguments: Any) -> Any:
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *arguments)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_unless_same)  # the interpreter copies onto the same
    images, words = torch.randn(1, 16, 3, 5, device=DEVICE), words_far_apart(tmp_path).to(DEVICE)
    ids = torch.tensor([[139, 128, 0, 127]], device=DEVICE)
    wanted = ops.cost_volume(images.double(), words.double(), ids, backend="reference")
    assert_close(ops.cost_volume(images, words, ids, backend="triton"), wanted, 1e-6)


def test_float32_products_are_made_of_three_tf32_products() -> None:
    """The interpreter computes tf32 as float32, so that no result could show a wrong choice here."""
    from errseg.kernels.cost_volume import CONFIGS

    for label, config in CONFIGS.items():
        product = config.constants.get("PRODUCT")
        assert product is None or (config.constants["PRECISION"] == "tf32x3") == (str(product) == "fp32"), label
