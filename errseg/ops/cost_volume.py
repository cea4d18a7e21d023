"""Cosines of pixels and words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect, expect_class_ids, expect_floating
from errseg.ops.contract import Op


def _fake(image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor | None) -> Tensor:
    batch, _, height, width = image_embeddings.shape
    num_classes = text_embeddings.shape[0] if class_ids is None else class_ids.shape[1]
    return image_embeddings.new_empty((batch, num_classes, height, width))


OP = Op(
    "cost_volume",
    "(Tensor image_embeddings, Tensor text_embeddings, Tensor? class_ids) -> Tensor",
    reference=reference.cost_volume,
    fake=_fake,
    differentiable=("image_embeddings", "text_embeddings"),
)


def _fake_scales(image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inverse lengths of the pixels [B, P] and of the selected words [B, K], in the precision of the sums."""
    costs = _fake(image_embeddings, text_embeddings, class_ids)
    batch, num_classes, height, width = costs.shape
    dtype = torch.promote_types(costs.dtype, torch.float32)
    return costs.new_empty((batch, height * width), dtype=dtype), costs.new_empty((batch, num_classes), dtype=dtype)


def _cuda_can_run(image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor | None) -> str | None:
    for embeddings in (image_embeddings, text_embeddings):
        if embeddings.dtype not in _CUDA_DTYPES:
            return f"no kernel for {embeddings.dtype}"
    batch = image_embeddings.shape[0]
    return None if batch <= _CUDA_IMAGES else f"at most {_CUDA_IMAGES} images, got {batch}"


_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_IMAGES = 65535  # blocks along an axis of the grid
_SCALES: dict[str, Any] = {"saved": ("pixel_scales", "word_scales"), "fake_saved": _fake_scales}
OP.register("cuda", native.cuda_backend("cost_volume", trains=True, can_run=_cuda_can_run, **_SCALES))
OP.register("triton", triton_backend.backend("cost_volume", **_SCALES))


def cost_volume(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    class_ids: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Cosine of every pixel embedding with every selected word embedding.

    Args:
        image_embeddings: [B, D, H, W], any length.
        text_embeddings: [T, D], any length; with ``class_ids`` only the selected rows are read and get gradients.
        class_ids: [B, K] int64 in [0, T), or ``None`` for all T.
        backend: strict choice of a backend.

    Returns:
        [B, K, H, W] cosines in [-1, 1], in the dtype of ``image_embeddings``; a zero vector has cosine 0.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, cost maps: cosine similarity of pixel and word.
    """
    expect_floating(image_embeddings, 4, "image_embeddings [B, D, H, W] floating")
    expect_floating(text_embeddings, 2, "text_embeddings [T, D] floating")
    channels = image_embeddings.shape[1]
    expect(text_embeddings.shape[1] == channels, f"text_embeddings [T, {channels}]", text_embeddings)
    if class_ids is not None:
        expect_class_ids(class_ids, image_embeddings.shape[0])
    return OP(image_embeddings, text_embeddings, class_ids, backend=backend)
