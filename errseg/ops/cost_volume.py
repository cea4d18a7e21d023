"""Cosines of pixels and words."""

from __future__ import annotations

from torch import Tensor

from errseg.ops import reference
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
