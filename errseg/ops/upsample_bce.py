"""The training loss over the selected classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect, expect_class_ids, expect_floating
from errseg.ops.contract import Op


def _fake(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty((), dtype=reference.score_dtype(logits))


OP = Op(
    "upsample_bce",
    "(Tensor logits, Tensor class_ids, Tensor target, int vocabulary_size, int ignore_index, bool exclude_ignored) "
    "-> Tensor",
    reference=reference.upsample_bce,
    fake=_fake,
    differentiable=("logits",),
)


def _fake_saved(logits: Tensor, *rest: object) -> tuple[Tensor]:
    return (logits.new_empty(logits.shape, dtype=reference.score_dtype(logits)),)


def _backward(grad: Tensor, logits: Tensor, *rest: Any) -> list[Tensor]:
    gradient = rest[-2]  # of the loss, saved by the forward pass in float32 or better
    return [(grad * gradient).to(logits.dtype)]


def _triton_can_run(logits: Tensor, class_ids: Tensor, target: Tensor, *rest: object) -> str | None:
    return triton_backend.sides_fit(*logits.shape[2:], *target.shape[1:])


OP.register("cpu", native.cpu_backend("upsample_bce", saved=("gradient",), fake_saved=_fake_saved, backward=_backward))
OP.register(
    "cuda", native.cuda_backend("upsample_bce", saved=("gradient",), fake_saved=_fake_saved, backward=_backward)
)
OP.register(
    "triton",
    triton_backend.backend("upsample_bce", saved=("gradient",), fake_saved=_fake_saved, can_run=_triton_can_run),
)


def upsample_bce(
    logits: Tensor,
    class_ids: Tensor,
    target: Tensor,
    *,
    vocabulary_size: int,
    ignore_index: int = 255,
    exclude_ignored: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy of the upsampled logits, mean over all B H W T elements, from the K selected alone.

    The T - K classes that were not selected have logit -100: they cost 100 at each pixel that shows them and
    nothing elsewhere.

    Args:
        logits: [B, K, h, w], brought to the target's size bilinearly (half-pixel centres) in float32 or better.
        class_ids: [B, K] int64, distinct within an image.
        target: [B, H, W] integer class ids in [0, T) or ``ignore_index``; any other value counts as ignored.
        vocabulary_size: T.
        ignore_index: marks pixels without a class; they count as negative for every class (published recipe).
        exclude_ignored: leave ignored pixels out of sum and mean instead.
        backend: strict choice of a backend.

    Returns:
        scalar, float32 (float64 for float64 logits); differentiable in ``logits``.

    Raises:
        ValueError: on wrong shapes, a floating target, or a vocabulary smaller than K.

    Source: published training loss; exact rewriting over the selected classes.
    """
    expect_floating(logits, 4, "logits [B, K, h, w] floating")
    expect_class_ids(class_ids, logits.shape[0], logits.shape[1])
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    expect(
        target.ndim == 3 and target.shape[0] == logits.shape[0] and integer,
        "target [B, H, W] integer",
        target,
    )
    expect(
        vocabulary_size >= logits.shape[1],
        f"vocabulary_size of at least K = {logits.shape[1]}",
        vocabulary_size,
    )
    return OP(logits, class_ids, target, vocabulary_size, ignore_index, exclude_ignored, backend=backend)
