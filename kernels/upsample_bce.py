"""Bilinear upsampling and binary cross-entropy: the loss and its gradient in one pass, gathered, without atomics.

A program owns a patch of low-resolution cells of a few classes. Its lanes are the intervals between cell centres; each
output pixel lies in one interval per axis and is evaluated there once, so that patches overlap by one interval only.
The share of a row's pixels that belongs to the row below is carried to the next step, the share that belongs to the
cell on the right moves one lane over. Every class is compared with the target where it is evaluated; as the ids are
distinct, the pixels of classes that were not selected are the valid pixels less the positive ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config, far_weight, first_in_interval


@triton.jit
def _softplus_and_sigmoid(x):
    """log(1 + exp(x)) with a small relative error at both ends, and its derivative."""
    decay = tl.exp(-tl.abs(x))
    rounded = 1.0 + decay
    inverse = 1.0 / rounded
    # log1p(decay): the logarithm of the rounded sum, and to first order what the rounding took.
    log1p = tl.log(rounded) + (decay - (rounded - 1.0)) * inverse
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0, inverse, decay * inverse)


_SIZES = ["num_classes", "in_height", "in_width", "height", "width", "rows"]
_NUMBERS = ["vocabulary_size", "ignore_index", "exclude_ignored", "elements"]


@triton.jit(do_not_specialize=_SIZES + _NUMBERS)
def _upsample_bce_fwd_kernel(
    logits,  # [B, K, h, w]
    class_ids,  # [B, K] int64
    target,  # [B, H, W] integer
    gradient,  # [B, K, h, w], not written unless GRADIENT
    costs,  # [programs] float64: the summed cost
    counts,  # [programs] int32: valid pixels, by the programs of the first classes
    num_classes,
    in_height,
    in_width,
    height,
    width,
    vocabulary_size,
    ignore_index,
    exclude_ignored,  # 0 or 1
    elements,  # the gradient's divisor, 1 while it is unknown
    rows,  # of cells per program
    GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr,
    CLASSES: tl.constexpr,
    LANES: tl.constexpr,
):
    strips = tl.cdiv(in_height, rows)
    patches = tl.cdiv(in_width, LANES - 1)
    first_row = tl.program_id(0) % strips * rows
    patch = tl.program_id(0) // strips % patches
    class_block = tl.program_id(0) // (strips * patches)
    image = tl.program_id(1).to(tl.int64)

    k = class_block * CLASSES + tl.arange(0, CLASSES)
    wanted = tl.load(class_ids + image * num_classes + k, mask=k < num_classes, other=-2).to(tl.int32)[:, None]
    lane = tl.arange(0, LANES)
    i = patch * (LANES - 1) - 1 + lane  # lane 0 belongs to the patch on the left, except at the edge
    own = (i < in_width) & ((lane > 0) | (i < 0))
    x_first = first_in_interval(i, in_width, width)
    x_count = tl.where(i < in_width, first_in_interval(i + 1, in_width, width) - x_first, 0)
    most_columns = (width + in_width - 1) // in_width
    # Weight of the tap on the right for the first output of an interval, and its growth per output, in 1 / 2W.
    weight_first = tl.where(i < 0, 2 * width, (2 * x_first + 1) * in_width - (2 * i + 1) * width)
    weight_first = tl.where(i >= in_width - 1, 0, weight_first)
    weight_step = tl.where((i < 0) | (i >= in_width - 1), 0, 2 * in_width)
    weight_unit = (2 * width).to(DTYPE)

    planes = image * num_classes * in_height * in_width
    cells = k[:, None] * (in_height * in_width) + i[None, :]
    # Beyond the edges a tap has weight 0, so that its value does not matter: no clamp, consecutive addresses.
    there_left = (k < num_classes)[:, None] & ((i >= 0) & (i < in_width))[None, :]
    there_right = (k < num_classes)[:, None] & (i + 1 < in_width)[None, :]
    row = logits + planes + tl.maximum(first_row - 1, 0) * in_width
    upper_left = tl.load(row + cells, mask=there_left, other=0.0).to(DTYPE)
    upper_right = tl.load(row + 1 + cells, mask=there_right, other=0.0).to(DTYPE)
    carried_left = tl.zeros((CLASSES, LANES), DTYPE)
    carried_right = tl.zeros((CLASSES, LANES), DTYPE)
    cost = tl.zeros((LANES,), tl.float64)
    count = tl.zeros((LANES,), tl.int32)

    for j in range(first_row - 1, tl.minimum(first_row + rows, in_height)):
        row = logits + planes + tl.minimum(j + 1, in_height - 1) * in_width
        lower_left = tl.load(row + cells, mask=there_left, other=0.0).to(DTYPE)
        lower_right = tl.load(row + 1 + cells, mask=there_right, other=0.0).to(DTYPE)
        here_left, here_right = carried_left, carried_right
        carried_left = tl.zeros((CLASSES, LANES), DTYPE)
        carried_right = tl.zeros((CLASSES, LANES), DTYPE)
        interval_cost = tl.zeros((CLASSES, LANES), DTYPE)
        positives = tl.zeros((CLASSES, LANES), tl.int32)
        valids = tl.zeros((LANES,), tl.int32)
        for y in range(first_in_interval(j, in_height, height), first_in_interval(j + 1, in_height, height)):
            below = far_weight(y, j, in_height, height, DTYPE)
            value_left = (1.0 - below) * upper_left + below * lower_left
            value_growth = (1.0 - below) * upper_right + below * lower_right - value_left
            row_left = tl.zeros((CLASSES, LANES), DTYPE)
            row_right = tl.zeros((CLASSES, LANES), DTYPE)
            pixels = target + (image * height + y) * width + x_first
            for column in range(most_columns):
                inside = column < x_count
                label = tl.load(pixels + column, mask=inside, other=0).to(tl.int64)
                valid = inside & (label != ignore_index) & (label >= 0) & (label < vocabulary_size)
                counted = (valid | (inside & (exclude_ignored == 0)))[None, :]
                positive = tl.where(valid, label, -1).to(tl.int32)[None, :] == wanted
                valids += valid.to(tl.int32)
                positives += positive.to(tl.int32)
                beside = ((weight_first + column * weight_step).to(DTYPE) / weight_unit)[None, :]
                value = value_left + beside * value_growth
                softplus, slope = _softplus_and_sigmoid(value)
                interval_cost += tl.where(counted, tl.where(positive, softplus - value, softplus), 0.0)
                if GRADIENT:
                    slope = tl.where(counted, tl.where(positive, slope - 1.0, slope), 0.0)
                    row_left += (1.0 - beside) * slope
                    row_right += beside * slope
            if GRADIENT:
                here_left += (1.0 - below) * row_left
                here_right += (1.0 - below) * row_right
                carried_left += below * row_left
                carried_right += below * row_right
        valids = tl.where(class_block == 0, valids, 0)
        missed = valids - tl.sum(positives, 0)
        interval_cost = tl.sum(tl.where((k < num_classes)[:, None], interval_cost, 0.0), 0).to(tl.float64)
        own_here = own & ((j >= first_row) | (j < 0))
        cost += tl.where(own_here, interval_cost + 100.0 * missed.to(tl.float64), 0.0)
        count += tl.where(own_here, valids, 0)
        if GRADIENT:
            # What lane l owes to the cell on its right is due to the cell of lane l + 1.
            neighbour = tl.maximum(lane - 1, 0)[None, :] + tl.zeros((CLASSES, LANES), tl.int32)
            total = (here_left + tl.gather(here_right, neighbour, 1)) / elements.to(DTYPE)
            stored = there_left & (lane > 0)[None, :] & (j >= first_row)
            tl.store(gradient + planes + tl.maximum(j, 0) * in_width + cells, total, mask=stored)
        upper_left, upper_right = lower_left, lower_right

    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(costs + program, tl.sum(cost, 0))
    tl.store(counts + program, tl.sum(count, 0))


@triton.jit(do_not_specialize=["programs", "num_pixels", "vocabulary_size", "exclude_ignored"])
def _upsample_bce_sum_kernel(
    costs,  # [programs]
    counts,  # [programs]
    loss,  # []
    scale,  # []: of the gradient
    programs,
    num_pixels,  # B H W
    vocabulary_size,
    exclude_ignored,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    cost = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, programs, BLOCK):
        cost += tl.load(costs + start + lanes, mask=start + lanes < programs, other=0.0)
        count += tl.load(counts + start + lanes, mask=start + lanes < programs, other=0).to(tl.int64)
    pixels = tl.where(exclude_ignored == 0, num_pixels.to(tl.int64), tl.sum(count, 0))
    elements = (tl.maximum(pixels, 1) * vocabulary_size).to(tl.float64)
    tl.store(loss, (tl.sum(cost, 0) / elements).to(loss.dtype.element_ty))
    tl.store(scale, (1.0 / elements).to(scale.dtype.element_ty))


TARGETS = (torch.int64, torch.uint8)  # read as they are; others become int64
MANY_PROGRAMS = 16 * 132  # fill a GPU, so that patches can be taller and overlap less
_TYPICAL = (32, 160, 160, 640, 640, 171, 255, 0, 640 * 640 * 171, 4)
CONFIGS: dict[str, Config] = {}
for _dtype in LANGUAGE_DTYPE:
    _score = torch.promote_types(_dtype, torch.float32)
    for _target in TARGETS:
        for _gradient in (False, True):
            CONFIGS[f"fwd {_dtype} {_target}{' gradient' * _gradient}"] = Config(
                _upsample_bce_fwd_kernel,
                (_dtype, torch.int64, _target, _score, torch.float64, torch.int32, *_TYPICAL),
                {
                    "GRADIENT": _gradient,
                    "DTYPE": LANGUAGE_DTYPE[_score],
                    "CLASSES": 4,  # share a thread, its targets and its weights
                    "LANES": 32,
                },
                num_warps=1,
                max_registers=255 if _score == torch.float64 else 192,
            )
for _score in (torch.float32, torch.float64):
    CONFIGS[f"sum {_score}"] = Config(
        _upsample_bce_sum_kernel,
        (torch.float64, torch.int32, _score, _score, 1920, 640 * 640, 171, 0),
        {"BLOCK": 1024},
        num_warps=4,
    )


def forward(
    logits: Tensor,
    class_ids: Tensor,
    target: Tensor,
    vocabulary_size: int,
    ignore_index: int,
    exclude_ignored: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and, in training, its gradient [B, K, h, w]; see :func:`errseg.ops.upsample_bce`."""
    batch, num_classes, in_height, in_width = logits.shape
    height, width = target.shape[1:]
    score_dtype = torch.promote_types(logits.dtype, torch.float32)
    target = target if target.dtype in TARGETS else target.to(torch.int64)
    loss = logits.new_empty((), dtype=score_dtype)
    scale = logits.new_empty((), dtype=score_dtype)
    gradient = logits.new_empty(logits.shape if training else 0, dtype=score_dtype)

    fwd = CONFIGS[f"fwd {logits.dtype} {target.dtype}{' gradient' * training}"]
    class_blocks = max(1, triton.cdiv(num_classes, fwd.constants["CLASSES"]))  # valid pixels are counted by the first
    patches = class_blocks * triton.cdiv(in_width, fwd.constants["LANES"] - 1)
    rows = 8 if batch * patches * triton.cdiv(in_height, 8) >= MANY_PROGRAMS else 4
    programs = patches * triton.cdiv(in_height, rows)
    costs = logits.new_empty(batch * programs, dtype=torch.float64)
    counts = logits.new_empty(batch * programs, dtype=torch.int32)
    num_pixels = batch * height * width
    elements = 1 if exclude_ignored else num_pixels * vocabulary_size
    if batch:
        arguments = logits.contiguous(), class_ids.contiguous(), target.contiguous(), gradient, costs, counts
        sizes = num_classes, in_height, in_width, height, width
        numbers = vocabulary_size, ignore_index, int(exclude_ignored), elements
        fwd.launch((programs, batch), *arguments, *sizes, *numbers, rows)
    sums = batch * programs, num_pixels, vocabulary_size, int(exclude_ignored)
    CONFIGS[f"sum {score_dtype}"].launch((1,), costs, counts, loss, scale, *sums)
    return loss, gradient.mul_(scale) if training and exclude_ignored else gradient


def backward(grad: Tensor, logits: Tensor, *arguments: Any) -> list[Tensor]:
    """d loss / d logits: the saved gradient times the incoming one."""
    *_, gradient, _needed = arguments
    return [torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=logits.dtype))]
