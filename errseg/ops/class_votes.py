"""Votes of the pixels for the words (RRHC, step one)."""

from __future__ import annotations

from torch import Tensor

from errseg.ops import native, reference, triton_backend
from errseg.ops.checks import expect, expect_floating
from errseg.ops.contract import Op


def _fake(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    shape = (image_embeddings.shape[0], text_embeddings.shape[0])
    return image_embeddings.new_empty(shape, dtype=reference.VOTE_DTYPE)


OP = Op(
    "class_votes",
    "(Tensor image_embeddings, Tensor text_embeddings) -> Tensor",
    reference=reference.class_votes,
    fake=_fake,
)

OP.register("cpu", native.cpu_backend("class_votes"))
OP.register("cuda", native.cuda_backend("class_votes"))
OP.register("triton", triton_backend.backend("class_votes"))


def class_votes(image_embeddings: Tensor, text_embeddings: Tensor, *, backend: str | None = None) -> Tensor:
    """Count, for every word, the pixels that rank it first, second and third by cosine.

    Args:
        image_embeddings: [B, D, H, W] pixel embeddings at 1/16 of the image, preferably with the channels last in
            memory; their length does not matter.
        text_embeddings: [T, D] word embeddings, T >= 1; normalised inside, ``1e-12`` guards zero vectors. Their
            dtype may differ; they are converted a few at a time.
        backend: strict choice of a backend.

    Returns:
        [B, T] int64, ``100 n1 + 10 n2 + n3`` with ``n_r`` the number of pixels whose rank-``r`` word it is. Equal
        cosines rank the lowest id first; with T < 3 only T ranks count. Products are float32-grade. No gradient.

    Raises:
        ValueError: on wrong shapes.

    Source: paper, RRHC: class selection; weights 1, 0.1, 0.01 scaled to exact integers.
    """
    check_embeddings(image_embeddings, text_embeddings)
    return OP(image_embeddings.detach(), text_embeddings.detach(), backend=backend)


def check_embeddings(image_embeddings: Tensor, text_embeddings: Tensor) -> None:
    """Raise ValueError unless these are [B, D, H, W] and [T, D] with T >= 1."""
    expect_floating(image_embeddings, 4, "image_embeddings [B, D, H, W] floating")
    expect_floating(text_embeddings, 2, "text_embeddings [T, D] floating")
    expect(text_embeddings.shape[0] > 0, "at least one text embedding", text_embeddings)
    channels = image_embeddings.shape[1]
    expect(text_embeddings.shape[1] == channels, f"text_embeddings [T, {channels}]", text_embeddings)
