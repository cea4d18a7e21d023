"""The CUDA kernels of upsample_bce, emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.ops import reference
from errseg.testing import assert_close, assert_within_eager_error
from tests.cuda.emulated import TYPES, EmulatorFault

Emulate = Callable[..., Any]
SOURCE = "upsample_bce/upsample_bce.cuh"
# B, K, h, w -> H, W
SHAPES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "one cell, many outputs": (1, 2, 1, 1, 90, 150),  # pieces of columns and of rows
    "odd": (2, 5, 7, 9, 22, 35),
    "tiles": (1, 11, 19, 33, 76, 132),  # of cells, and two groups of classes
    "as it is": (1, 3, 20, 70, 20, 70),
    "smaller": (1, 4, 40, 83, 13, 37),
    "large steps": (1, 2, 3, 4, 100, 139),
}


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("upsample_bce")


def run(
    device: Any,
    logits: Tensor,
    ids: Tensor,
    target: Tensor,
    words: int,
    *,
    exclude: bool = False,
    training: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient into poisoned memory."""
    dtype = reference.score_dtype(logits)
    loss = torch.full((), float("nan"), dtype=dtype)
    gradient = torch.full(logits.shape, float("nan"), dtype=dtype)
    integer = (target.element_size(), target.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.uint64))
    sizes = (logits.shape[0], logits.shape[1], *logits.shape[2:], *target.shape[1:])
    results = (loss, gradient if training else None)
    inputs = (TYPES[logits.dtype], logits.contiguous(), ids, target, *integer)
    device("upsample_bce", seed, *inputs, *results, *sizes, words, 255, exclude)
    return loss, gradient


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits, ids, target with missed, ignored and unknown classes, vocabulary size."""
    batch, classes, h, w, height, width = shape
    words = 2 * classes + 1
    logits = (torch.randn(batch, classes, h, w) * 3).to(dtype)
    ids = torch.rand(batch, words).argsort(1)[:, :classes].contiguous()
    target = torch.randint(-1, words + 2, (batch, height, width))
    return logits, ids, target.where(target != words + 1, 255), words


def expected(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = reference.upsample_bce(leaf, *rest)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def check(
    device: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, exclude: bool = False, seed: int = 0
) -> None:
    """Against float64 of the same logits: loss to 1e-6, gradient to twice eager's error in the same precision."""
    logits, ids, target, words = draw(shape, dtype)
    loss, gradient = run(device, logits, ids, target, words, exclude=exclude, seed=seed)
    rest = ids, target, words, 255, exclude
    wanted_loss, wanted = expected(logits.double(), *rest)
    if dtype == torch.float64:
        assert_close(loss, wanted_loss, 1e-13)
        assert_close(gradient, wanted, 1e-13)
    else:
        assert_close(loss, wanted_loss, 5e-7)
        assert_within_eager_error(gradient, expected(logits.float(), *rest)[1], wanted)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(device: Any, shape: tuple[int, ...], exclude: bool) -> None:
    check(device, shape, torch.float64, exclude, seed=1)
    check(device, shape, torch.float32, exclude, seed=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(device: Any, dtype: torch.dtype) -> None:
    check(device, SHAPES["odd"], dtype, seed=3)


def test_random_shapes(device: Any) -> None:
    for seed in range(30):
        b, k, h, w, height, width = (int(torch.randint(1, most, ())) for most in (3, 9, 25, 25, 80, 80))
        check(device, (b, k, h, w, height, width), torch.float64, bool(seed % 2), seed)


def test_the_result_is_the_same_in_every_schedule(device: Any) -> None:
    arguments = draw(SHAPES["tiles"], torch.float32)
    loss, gradient = run(device, *arguments)
    for seed in range(1, 6):
        again = run(device, *arguments, seed=seed)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
)
def test_targets_of_any_integer_type(device: Any, dtype: torch.dtype) -> None:
    logits, ids, target, words = draw(SHAPES["odd"], torch.float32)
    target = target.clamp(0, words)  # `words` is no class, and every type holds it
    wanted = run(device, logits, ids, target, words)
    got = run(device, logits, ids, target.to(dtype), words)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("exclude", [False, True])
def test_without_training_no_gradient_is_written(device: Any, exclude: bool) -> None:
    arguments = draw(SHAPES["tiles"], torch.float64)
    loss, gradient = run(device, *arguments, exclude=exclude, training=False)
    assert gradient.isnan().all()
    assert_close(loss, run(device, *arguments, exclude=exclude)[0], 1e-14)


def test_missed_and_ignored_pixels(device: Any) -> None:
    logits, ids = torch.full((1, 1, 2, 2), -50.0), torch.tensor([[3]])
    target = torch.tensor([[[3, 1], [255, 3]]])
    assert run(device, logits, ids, target, 5)[0].item() == pytest.approx((100 + 2 * 50) / (4 * 5))
    assert run(device, logits, ids, target, 5, exclude=True)[0].item() == pytest.approx((100 + 2 * 50) / (3 * 5))
    loss, gradient = run(device, logits, ids, torch.full_like(target, 255), 5, exclude=True)
    assert loss == 0 and (gradient == 0).all()


def test_far_logits_keep_their_precision(device: Any) -> None:
    ids, target = torch.tensor([[0, 1]]), torch.zeros(1, 8, 8, dtype=torch.int64)
    logits = torch.tensor([20.0, -20.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).contiguous()  # both right
    loss, gradient = run(device, logits, ids, target, 2)
    wanted = expected(logits.double(), ids, target, 2, 255, False)
    assert_close(loss, wanted[0], 1e-6)
    assert_close(gradient, wanted[1], 1e-6)


def test_an_empty_batch(device: Any) -> None:
    nothing = torch.zeros((0, 2), dtype=torch.int64)
    loss, _ = run(device, torch.randn(0, 2, 4, 5), nothing, torch.zeros((0, 8, 9), dtype=torch.int64), 3)
    assert loss == 0


@pytest.mark.parametrize("name", ["one cell, many outputs", "odd", "smaller"])
def test_under_sanitizers(emulate: Emulate, name: str) -> None:
    check(emulate("upsample_bce", sanitized=True), SHAPES[name], exclude=name == "odd", seed=7)


BREAKS = {
    "last column of tiles dropped": ("dim3(ceil_div(x.in, cells_x), ", "dim3(std::max(1, x.in / cells_x), "),
    "rim left out": ("training ? p.y.first_output(first_y - 1) : own_row", "own_row"),
    "rim counted twice": ("top + r >= own_row && column >= own_column", "top + r >= own_row"),
    "last row loses its weight": ("last ? to_top + to_bottom : to_top", "to_top"),
    "tail unwritten": ("active && cell < p.cells_y * p.cells_x", "active && cell < p.cells_y * p.cells_x - 1"),
    "no barrier before the gather": ("walk.store_both();\n            __syncthreads();", "walk.store_both();"),
    "no barrier after the labels": (
        "__syncthreads();\n                }\n                if (!active",
        "}\n                if (!active",
    ),
    "missed pixels free": ("kMissedCost * missed", "0 * missed"),
    "last group of classes dropped": ("std::max(1, ceil_div(classes, kClasses))", "std::max(1, classes / kClasses)"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    broken = emulate("upsample_bce", edits={SOURCE: BREAKS[name]})
    with pytest.raises((AssertionError, EmulatorFault)):
        check(broken, SHAPES["tiles"], torch.float64, seed=1)
