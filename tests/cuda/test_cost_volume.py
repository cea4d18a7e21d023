"""The CUDA kernels of cost_volume, emulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.testing import assert_close, assert_within_eager_error, published_cost_volume
from tests.cuda.emulated import TYPES, EmulatorFault
from tests.ops.cases import words_far_apart

Emulate = Callable[..., Any]
SOURCE = "cost_volume/cost_volume.cuh"
ONE, MANY = 1, 132  # multiprocessors: one split of the pixels, or as many as there are tiles
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("cost_volume")


def run(
    device: Any,
    images: Tensor,
    text: Tensor,
    ids: Tensor | None,
    grad: Tensor,
    *,
    last: bool = False,
    seed: int = 0,
    multiprocessors: int = MANY,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, D, P], [T, D], [B, K], [B, K, P] -> costs and both gradients; what is not written stays NaN."""
    batch, channels, num_pixels = images.shape
    stored = images.mT.contiguous() if last else images.contiguous()  # channels last, or pixels
    strides = torch.tensor([channels * num_pixels, *((1, channels) if last else (num_pixels, 1)), text.stride(0)])
    classes = len(text) if ids is None else ids.shape[1]
    sizes = torch.tensor([batch, channels, num_pixels, classes])
    scales = torch.full((batch, num_pixels), torch.nan), torch.full((batch, classes), torch.nan)
    types = TYPES[images.dtype], TYPES[text.dtype]
    problem = (*types, stored, text if text.is_contiguous() else text.data_ptr(), ids, strides, sizes, *scales)
    costs = torch.full((batch, classes, num_pixels), torch.nan, dtype=images.dtype)
    device("forward", seed, *problem, costs)
    grad = grad.to(images.dtype).contiguous()
    pixel_grads = torch.full(images.shape, torch.nan, dtype=images.dtype)
    device("backward_pixels", seed, *problem, grad, pixel_grads)
    word_grads = torch.full(text.shape, torch.nan if ids is None else 0.0, dtype=text.dtype)
    device("backward_words", seed, *problem, grad, word_grads, multiprocessors)
    return costs, pixel_grads, word_grads


def expected(images: Tensor, text: Tensor, ids: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reference in float64."""
    leaves = [t.double().requires_grad_() for t in (images[..., None], text)]
    costs = ops.cost_volume(*leaves, ids, backend="reference")
    pixel_grads, word_grads = torch.autograd.grad(costs, leaves, grad[..., None])
    return costs.detach()[..., 0], pixel_grads[..., 0], word_grads


def draw(
    batch: int, channels: int, num_pixels: int, classes: int, words: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Images, words, distinct ids and a gradient whose values `dtype` holds."""
    images, text = torch.randn(batch, channels, num_pixels).to(dtype), torch.randn(words, channels).to(dtype)
    ids = torch.rand(batch, words).argsort(1)[:, :classes].contiguous()
    return images, text, ids, torch.randn(batch, classes, num_pixels).to(dtype).double()


def check(device: Any, arguments: tuple[Any, ...], tolerance: float, **options: Any) -> None:
    names = "costs", "gradient of images", "gradient of text"
    for name, got, right in zip(names, run(device, *arguments, **options), expected(*arguments), strict=True):
        assert_close(got, right, tolerance, name)


TOLERANCES = {torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(1, 10, 1, 1, 1), (2, 64, 32, 64, 70), (2, 65, 33, 65, 66), (1, 63, 47, 48, 60), (1, 130, 16, 3, 5)],
)
def test_tails_of_every_tile(device: Any, sizes: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    check(device, draw(*sizes, dtype), TOLERANCES[dtype], last=last, seed=sizes[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_eager(device: Any, dtype: torch.dtype) -> None:
    images, text, ids, grad = draw(1, 640, 35, 48, 60, dtype)
    leaves = [t.detach().requires_grad_() for t in (images[..., None], text)]
    costs = published_cost_volume(*leaves).gather(1, ids[..., None, None].expand(-1, -1, 35, 1))
    eager = [costs.detach()[..., 0], *torch.autograd.grad(costs, leaves, grad[..., None].to(dtype))]
    eager[1] = eager[1][..., 0]
    found = run(device, images, text, ids, grad, last=True)
    for got, beside, right in zip(found, eager, expected(images, text, ids, grad), strict=True):
        assert_within_eager_error(got, beside, right)


@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
def test_words_selected_twice_get_the_sum(device: Any, multiprocessors: int) -> None:
    images, text, _, _ = draw(3, 20, 40, 4, 11, torch.float32)
    ids = torch.tensor([[4, 1, 4, 10], [1, 1, 1, 0], [4, 2, 0, 9]])
    grad = torch.randn(3, 4, 40).double()
    check(device, (images, text, ids, grad), 5e-7, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_words_in_order(device: Any, dtype: torch.dtype) -> None:
    images, text, _, grad = draw(3, 20, 40, 70, 70, dtype)
    check(device, (images, text, None, grad), TOLERANCES[dtype])


@pytest.mark.parametrize(("image", "text"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_types_may_differ(device: Any, image: torch.dtype, text: torch.dtype) -> None:
    images, words, ids, grad = draw(1, 24, 20, 5, 9, torch.bfloat16)
    arguments = images.to(image), words.to(text), ids, grad
    check(device, arguments, 8e-3)
    # Only what is written may be rounded to half precision.
    for got, right in zip(run(device, *arguments), expected(*arguments), strict=True):
        assert_close(got, right.to(got.dtype), 1e-6 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps)


def test_rows_of_words_may_lie_apart(device: Any) -> None:
    images, text, ids, grad = draw(1, 20, 21, 5, 9, torch.float32)
    for view in (torch.randn(9, 48)[:, 8:28], torch.randn(9, 48)[:, 5:25], text[:1].expand(9, 20)):
        check(device, (images, view, ids, grad), 5e-7)


def test_offsets_beyond_32_bits(device: Any, tmp_path: Path) -> None:
    words = words_far_apart(tmp_path)
    images, _, ids, grad = draw(2, 16, 21, 5, len(words), torch.float32)
    check(device, (images, words, ids, grad), TOLERANCES[torch.bfloat16])


def check_clamp(device: Any) -> None:
    """Shorter than 1e-12 a length is constant, and the vector's gradient not projected."""
    images, text, ids, grad = draw(1, 10, 20, 4, 6, torch.float32)
    images[..., 0], images[..., 1] = 0, images[..., 1] * 1e-14
    text[ids[0, 0]], text[ids[0, 1]] = 0, text[ids[0, 1]] * 1e-14
    found, wanted = run(device, images, text, ids, grad), expected(images, text, ids, grad)
    assert_close(found[0], wanted[0], 1e-6)
    for pixel in range(3):
        assert_close(found[1][..., pixel], wanted[1][..., pixel], 1e-6)
    for word in ids[0]:
        assert_close(found[2][word], wanted[2][word], 1e-6)


def test_zero_and_tiny_vectors_have_the_gradients_of_the_clamp(device: Any) -> None:
    check_clamp(device)


def test_every_schedule_gives_the_same_numbers(device: Any) -> None:
    arguments = draw(2, 70, 40, 66, 70, torch.float32)
    first = run(device, *arguments)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(run(device, *arguments, seed=seed), first, strict=True))


@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 640, 1600, 48), (8, 640, 1600, 48), (1, 10, 1, 1), (1, 768, 2304, 847)])
def test_splits_cover_all_pixels(device: Any, sizes: tuple[int, ...], dtype: torch.dtype, multiprocessors: int) -> None:
    result = torch.zeros(2, dtype=torch.int64)
    device("splits", TYPES[dtype], torch.tensor(sizes), multiprocessors, result)
    pixels, count = result.tolist()
    assert pixels % 16 == 0 and 1 <= count <= 16
    assert (count - 1) * pixels < sizes[2] <= count * pixels


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_sanitizers(emulate: Emulate, dtype: torch.dtype, last: bool) -> None:
    sanitized = emulate("cost_volume", sanitized=True)
    check(sanitized, draw(2, 67, 35, 5, 9, dtype), TOLERANCES[dtype], last=last, seed=5)


BREAKS = {
    "last channels dropped": (
        "channel < p.channels; channel += kChannels",
        "channel + kChannels <= p.channels; channel += kChannels",
    ),
    "last pixels of a split dropped": ("first_pixel < end;", "first_pixel + kPixels<How> <= end;"),
    "no barrier before the products": (
        "pixels.store(shared.pixels);\n        __syncthreads();\n        if (channel",
        "pixels.store(shared.pixels);\n        if (channel",
    ),
    "no barrier after the products": (
        "pixels.add_squares(pixel_squares);\n        __syncthreads();",
        "pixels.add_squares(pixel_squares);",
    ),
    "clamped vectors projected": ("scale < kLargestScale ?", "true ?"),
    "later pairs of a word lost": ("= p.class_ids ? following[pair] :", "= p.class_ids ? p.pairs() :"),
    "every pair writes": ("!leading[first]) return;", "false) return;"),
    "words not divided by their length": ("words.scale_row(i,", "words.scale_row(i, 1.0f + 0.0f *"),
    "two parts only": ("body(Split<bf16, 3>{})", "body(Split<bf16, 2>{})"),
    "sums kept in the tensor cores": (
        "float fresh[kLeft][4] = {};",
        "float fresh[kLeft][4]; for (int m = 0; m < kLeft; ++m) for (int i = 0; i < 4; ++i)"
        " fresh[m][i] = sums[m][n + h][i], sums[m][n + h][i] = 0;",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    broken = emulate("cost_volume", edits={SOURCE: BREAKS[name]})
    with pytest.raises((AssertionError, EmulatorFault)):
        check(broken, draw(2, 67, 35, 5, 9, torch.float32), TOLERANCES[torch.float32], seed=1)
        test_words_selected_twice_get_the_sum(broken, ONE)
        check_clamp(broken)
        test_error_is_at_most_twice_eager(broken, torch.float32)
