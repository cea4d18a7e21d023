"""The CUDA kernels of upsample_argmax, emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops import reference
from errseg.testing import assert_absolutely_close, assert_labels_equal_except_ties
from tests.cuda.emulated import TYPES, EmulatorFault

Emulate = Callable[..., Any]
SOURCE = "upsample_argmax/upsample_argmax.cuh"
# B, K, h, w -> H, W
SHAPES = {
    "one pixel": (1, 1, 1, 1, 1, 1),
    "one cell": (1, 3, 1, 1, 33, 65),
    "odd": (2, 5, 7, 9, 22, 35),
    "scale four": (1, 48, 12, 17, 48, 68),
    "as it is": (1, 6, 35, 33, 35, 33),
    "chunks of classes": (1, 300, 9, 10, 33, 37),
    "smaller": (1, 7, 50, 47, 31, 36),
    "much smaller": (2, 3, 150, 160, 9, 40),  # outputs share no inputs: the direct kernel
    "rows only": (1, 4, 3, 40, 70, 40),
}


@pytest.fixture(scope="module")
def device(emulate: Emulate) -> Any:
    return emulate("upsample_argmax")


def run(
    device: Any, logits: Tensor, ids: Tensor, size: tuple[int, int], seed: int = 0, *, return_scores: bool = True
) -> tuple[Tensor, Tensor]:
    """Labels and scores, or labels alone, into poisoned memory."""
    shape = (logits.shape[0], *size)
    labels = torch.full(shape, -7, dtype=torch.int32)
    scores = torch.full(shape, float("nan"), dtype=reference.score_dtype(logits))
    sizes = (logits.shape[0], logits.shape[1], *logits.shape[2:], *size)
    written = (labels, scores if return_scores else None)
    device("upsample_argmax", seed, TYPES[logits.dtype], logits.contiguous(), ids, *written, *sizes)
    return labels, scores


def ids_for(batch: int, classes: int, *, ascending: bool) -> Tensor:
    order = torch.rand(batch, 2 * classes + 3).argsort(1)[:, :classes]
    return order.sort(1).values if ascending else order.contiguous()


def check(
    device: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, ascending: bool = True
) -> None:
    """Against float64 of the same logits: labels equal except at ties, scores to twice eager's error in float32."""
    batch, classes, h, w, *size = shape
    logits = (torch.randn(batch, classes, h, w) * 3).to(dtype)
    ids = ids_for(batch, classes, ascending=ascending)
    labels, scores = run(device, logits, ids, (size[0], size[1]), seed)
    wanted_labels, wanted_scores = reference.upsample_argmax(logits.double(), ids, *size, True)
    eager_error = (reference.upsample_argmax(logits, ids, *size, True)[1] - wanted_scores).abs().max().item()
    tolerance = max(2 * eager_error, 1e-13 if dtype == torch.float64 else 1e-6)
    maps = F.interpolate(logits.double().sigmoid(), size=size, mode="bilinear", align_corners=False)
    best = maps.topk(min(2, classes), dim=1).values
    margin = best[:, 0] - best[:, -1] if classes > 1 else torch.ones_like(best[:, 0])
    assert_labels_equal_except_ties(labels, wanted_labels, margin, 2 * tolerance)
    assert_absolutely_close(scores, wanted_scores, tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(device: Any, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        check(device, shape, seed=seed, ascending=seed != 1)


@pytest.mark.parametrize("name", ["odd", "much smaller"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_type(device: Any, dtype: torch.dtype, name: str) -> None:
    check(device, SHAPES[name], dtype, seed=4)


@pytest.mark.parametrize("name", ["odd", "much smaller"])
def test_labels_alone(device: Any, name: str) -> None:
    batch, classes, h, w, *size = SHAPES[name]
    logits, ids = torch.randn(batch, classes, h, w) * 3, ids_for(batch, classes, ascending=True)
    labels, untouched = run(device, logits, ids, (size[0], size[1]), return_scores=False)
    assert torch.equal(labels, run(device, logits, ids, (size[0], size[1]))[0]) and untouched.isnan().all()


def test_random_shapes(device: Any) -> None:
    for seed in range(40):
        b, k, h, w, height, width = (int(torch.randint(1, most, ())) for most in (3, 9, 30, 30, 75, 75))
        check(device, (b, k, h, w, height, width), seed=seed, ascending=bool(seed % 2))


@pytest.mark.parametrize("size", [(12, 13), (2, 1)])
def test_ties_go_to_the_lowest_id_in_any_order(device: Any, size: tuple[int, int]) -> None:
    check_ties(device, size)


def check_ties(device: Any, size: tuple[int, int] = (12, 13), height: int = 3) -> None:
    for ids in ([[9, 3, 7, 5]], [[3, 5, 7, 9]]):
        logits, lowest = torch.full((1, 4, height, 4), 2.0), min(ids[0])
        assert run(device, logits, torch.tensor(ids), size)[0].unique().tolist() == [lowest]
        logits[0, 2], logits[0, 3] = 40.0, 30.0  # both saturated
        assert run(device, logits, torch.tensor(ids), size)[0].unique().tolist() == [min(ids[0][2:])]


def test_ties_in_the_direct_kernel(device: Any) -> None:
    ids, logits = torch.tensor([[9, 3, 7, 5]]), torch.full((1, 4, 200, 210), 2.0)
    assert run(device, logits, ids, (3, 5))[0].unique().tolist() == [3]


def test_hopeless_logits_still_get_a_label(device: Any) -> None:
    ids = torch.tensor([[4, 8]])
    assert run(device, torch.full((1, 2, 2, 2), -200.0), ids, (4, 4))[0].unique().tolist() == [4]
    labels, _ = run(device, torch.full((1, 2, 2, 2), float("nan")), ids, (4, 4))
    assert labels.unique().tolist() == [4]


def test_an_empty_batch(device: Any) -> None:
    run(device, torch.randn(0, 3, 4, 5), torch.zeros((0, 3), dtype=torch.int64), (8, 9))


@pytest.mark.parametrize("name", ["odd", "chunks of classes", "much smaller"])
def test_under_sanitizers(emulate: Emulate, name: str) -> None:
    device, (batch, classes, h, w, *size) = emulate("upsample_argmax", sanitized=True), SHAPES[name]
    check(device, SHAPES[name], seed=7, ascending=False)
    logits, ids = torch.randn(batch, classes, h, w), ids_for(batch, classes, ascending=True)
    run(device, logits, ids, (size[0], size[1]), return_scores=False)


BREAKS = {
    "last row of tiles dropped": (
        "const dim3 grid(tiles_x, ceil_div(p.y.out, kTile), ",
        "const dim3 grid(tiles_x, 1, ",
    ),
    "ties to the last": ("if (other > score || ", "if (other >= score || "),
    "ties to the highest id": ("other_id < id", "other_id > id"),
    "tail unwritten": ("first_row + r >= p.y.out", "first_row + r >= p.y.out - 1"),
    "last chunk dropped": ("start < p.classes;", "start + chunk <= p.classes - 1;"),
    "no barrier before the scan": ("__syncthreads();\n        if (in_order)", "if (in_order)"),
    "a row taken over wrongly": ("== at + 1 ? bottom", "== at + 1 ? top"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails(emulate: Emulate, name: str) -> None:
    broken = emulate("upsample_argmax", edits={SOURCE: BREAKS[name]})
    with pytest.raises((AssertionError, EmulatorFault)):
        for shape in (SHAPES["chunks of classes"], SHAPES["odd"]):
            check(broken, shape, seed=1, ascending=False)
        check_ties(broken)
