"""From logits to a label map."""

from __future__ import annotations

import torch
from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect, expect_class_ids, expect_floating
from errseg.ops.contract import Op


def _fake(logits: Tensor, class_ids: Tensor, height: int, width: int, return_scores: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], height, width)
    scores = logits.new_empty(shape if return_scores else 0, dtype=reference.score_dtype(logits))
    return logits.new_empty(shape, dtype=torch.int32), scores


def _triton_can_run(logits: Tensor, class_ids: Tensor, height: int, width: int, return_scores: bool) -> str | None:
    return triton_backend.sides_fit(*logits.shape[2:], height, width)


OP = Op(
    "upsample_argmax",
    "(Tensor logits, Tensor class_ids, int height, int width, bool return_scores) -> (Tensor, Tensor)",
    reference=reference.upsample_argmax,
    fake=_fake,
)

OP.register("cpu", native.cpu_backend("upsample_argmax"))
OP.register("cuda", native.cuda_backend("upsample_argmax"))
OP.register("triton", triton_backend.backend("upsample_argmax", can_run=_triton_can_run))


def upsample_argmax(
    logits: Tensor,
    class_ids: Tensor,
    size: tuple[int, int],
    *,
    return_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sigmoid, bilinear to ``size`` (half-pixel centres), then the class of the largest probability.

    Args:
        logits: [B, K, h, w], K >= 1.
        class_ids: [B, K] int64, any order, below 2**31.
        size: (H, W) of the label map in pixels.
        return_scores: also return the winning probabilities, which are not written otherwise.
        backend: strict choice of a backend.

    Returns:
        labels [B, H, W] int32, the winning class ids, equal probabilities to the lowest id; with
        ``return_scores`` also scores [B, H, W] in [0, 1], float32 (float64 for float64 logits). No gradient.

    Raises:
        ValueError: on wrong shapes or an empty size.

    Source: published inference; the sigmoid is taken at low resolution and in float32.
    """
    expect_floating(logits, 4, "logits [B, K, h, w] floating")
    expect(logits.shape[1] > 0, "logits of at least one class", logits)
    expect_class_ids(class_ids, logits.shape[0], logits.shape[1])
    expect(len(size) == 2 and min(size) >= 1, "size (H, W) of at least 1 x 1", size)
    labels, scores = OP(logits.detach(), class_ids, *size, return_scores, backend=backend)
    return (labels, scores) if return_scores else labels
