"""Sigmoid, bilinear upsampling and argmax over the classes, without an upsampled class map.

Two launches. The first takes the sigmoid at low resolution, once per logit rather than once per tap, and puts the
classes in ascending order of their ids on the way: a rank is a count, which is cheaper than a sort. The second walks
over the classes with a running maximum. Its programs own the output rows between two low-resolution rows, so that
one set of four loads serves all of them: at scale 4 a quarter of the loads that a program per pixel would need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, far_weight, first_in_interval, interval_of


@triton.jit(do_not_specialize=["num_classes", "num_pixels"])
def _upsample_argmax_sort_kernel(
    logits,  # [B, K, h, w]
    class_ids,  # [B, K] int64
    probabilities,  # [B, K, h, w], classes in ascending order of their ids
    sorted_ids,  # [B, K] int32
    num_classes,
    num_pixels,  # h * w
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    pixel_blocks = tl.cdiv(num_pixels, BLOCK)
    plane = tl.program_id(0) // pixel_blocks
    image = (plane // num_classes).to(tl.int64)
    k = plane % num_classes
    ids = class_ids + image * num_classes
    own = tl.load(ids + k)
    smaller = tl.zeros((IDS,), tl.int32)
    for start in range(0, num_classes, IDS):
        others = start + tl.arange(0, IDS)
        other = tl.load(ids + others, mask=others < num_classes, other=own)
        before = (other < own) | ((other == own) & (others < k))
        smaller += (before & (others < num_classes)).to(tl.int32)
    rank = tl.sum(smaller, 0)
    block = tl.program_id(0) % pixel_blocks
    pixels = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < num_pixels
    values = tl.load(logits + (image * num_classes + k) * num_pixels + pixels, mask=inside, other=0.0)
    values = tl.sigmoid(values.to(DTYPE))
    tl.store(probabilities + (image * num_classes + rank) * num_pixels + pixels, values, mask=inside)
    tl.store(sorted_ids + image * num_classes + rank, own.to(tl.int32), mask=block == 0)


@triton.jit(do_not_specialize=["num_classes", "in_height", "in_width", "height", "width"])
def _upsample_argmax_fwd_kernel(
    probabilities,  # [B, K, h, w]
    sorted_ids,  # [B, K]
    labels,  # [B, H, W] int32
    scores,  # [B, H, W] with SCORES
    num_classes,
    in_height,
    in_width,
    height,
    width,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORES: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    column_blocks = tl.cdiv(width, COLUMNS)
    x = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    block = block // column_blocks
    j = block % (in_height + 1) - 1
    y = first_in_interval(j, in_height, height) + block // (in_height + 1) * ROWS + tl.arange(0, ROWS)
    last = first_in_interval(j + 1, in_height, height)

    i = interval_of(x, in_width, width)
    right_weight = far_weight(x, i, in_width, width, DTYPE)
    left = tl.maximum(i, 0)
    right = tl.minimum(i + 1, in_width - 1)
    lower_weight = far_weight(y, j, in_height, height, DTYPE)[:, None]
    upper_row = tl.maximum(j, 0) * in_width
    lower_row = tl.minimum(j + 1, in_height - 1) * in_width

    best = tl.full((ROWS, COLUMNS), -1.0, DTYPE)
    winner = tl.zeros((ROWS, COLUMNS), tl.int32)
    ids = sorted_ids + image * num_classes
    inside = x < width
    plane = probabilities + image * num_classes * in_height * in_width
    for k in range(num_classes):
        upper = (1.0 - right_weight) * tl.load(plane + upper_row + left, mask=inside, other=0.0)
        upper += right_weight * tl.load(plane + upper_row + right, mask=inside, other=0.0)
        lower = (1.0 - right_weight) * tl.load(plane + lower_row + left, mask=inside, other=0.0)
        lower += right_weight * tl.load(plane + lower_row + right, mask=inside, other=0.0)
        value = (1.0 - lower_weight) * upper[None, :] + lower_weight * lower[None, :]
        better = value > best  # strictly: equal probabilities stay with the lower id
        best = tl.where(better, value, best)
        winner = tl.where(better, tl.load(ids + k), winner)
        plane += in_height * in_width

    written = (y < last)[:, None] & inside[None, :]
    out = (image * height + y[:, None]) * width + x[None, :]
    tl.store(labels + out, winner, mask=written)
    if SCORES:
        tl.store(scores + out, best, mask=written)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIGS: dict[str, Config] = {}
for _dtype in FLOATS:
    _score = torch.promote_types(_dtype, torch.float32)
    CONFIGS[f"sort {_dtype}"] = Config(
        _upsample_argmax_sort_kernel,
        (_dtype, torch.int64, _score, torch.int32, 48, 25600),
        {"DTYPE": LANGUAGE_DTYPE[_score], "BLOCK": 1024, "IDS": 64},
        num_warps=4,
    )
for _score in (torch.float32, torch.float64):
    # One warp per program: its rows share the taps without passing them through shared memory.
    for _what in ("labels", "scores"):
        CONFIGS[f"{_what} {_score}"] = Config(
            _upsample_argmax_fwd_kernel,
            (_score, torch.int32, torch.int32, _score, 48, 160, 160, 640, 640),
            {"DTYPE": LANGUAGE_DTYPE[_score], "ROWS": 4, "COLUMNS": 128, "SCORES": _what == "scores"},
            num_warps=1,
        )


def forward(logits: Tensor, class_ids: Tensor, height: int, width: int, return_scores: bool) -> tuple[Tensor, Tensor]:
    """[B, K, h, w], [B, K] -> labels [B, H, W], scores likewise or empty; see :func:`errseg.ops.upsample_argmax`."""
    batch, num_classes, in_height, in_width = logits.shape
    score_dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = logits.new_empty((batch, height, width), dtype=torch.int32)
    scores = logits.new_empty(labels.shape if return_scores else 0, dtype=score_dtype)
    if not labels.numel():
        return labels, scores
    probabilities = logits.new_empty(logits.shape, dtype=score_dtype)
    sorted_ids = class_ids.new_empty(class_ids.shape, dtype=torch.int32)
    sort = CONFIGS[f"sort {logits.dtype}"]
    num_pixels = in_height * in_width
    grid = (triton.cdiv(num_pixels, sort.constants["BLOCK"]) * batch * num_classes,)
    arguments = logits.contiguous(), class_ids.contiguous(), probabilities, sorted_ids
    sort.launch(grid, *arguments, num_classes, num_pixels)
    fwd = CONFIGS[f"{'scores' if return_scores else 'labels'} {score_dtype}"]
    row_blocks = triton.cdiv(triton.cdiv(height, in_height), fwd.constants["ROWS"]) * (in_height + 1)
    grid = (triton.cdiv(width, fwd.constants["COLUMNS"]) * row_blocks, batch)
    fwd.launch(grid, probabilities, sorted_ids, labels, scores, num_classes, in_height, in_width, height, width)
    return labels, scores
