"""From embeddings to the few classes that an image keeps: votes, then selection."""

from __future__ import annotations

import torch
from torch import Tensor

from errseg.ops.class_votes import check_embeddings, class_votes
from errseg.ops.select_classes import check_selection, select_classes


def reduce_vocabulary(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    num_selected: int,
    required: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Reduce the vocabulary to the ``num_selected`` words that the pixels vote for.

    Two ops: :func:`class_votes`, then :func:`select_classes`, whose rule for ties and for the ground truth holds.
    With T <= K nothing is voted on, since every word is kept. No memory grows with both words and pixels: a million
    words and 40 x 40 pixels take less than 64 MB beside the arguments (tested on the CPU).

    Args:
        image_embeddings: [B, D, H, W] pixel embeddings at 1/16 of the image; their length does not matter.
        text_embeddings: [T, D] word embeddings, T >= 1, of any length and floating dtype.
        num_selected: K >= 1.
        required: [B, T] bool, the classes of the ground truth, which come first (training).
        backend: strict choice of a backend for the votes.

    Returns:
        [B, min(K, T)] int64 class ids, ascending. No host synchronisation, no gradient.

    Raises:
        ValueError: on wrong shapes or types, or K < 1.

    Source: paper, RRHC: class selection.
    """
    check_embeddings(image_embeddings, text_embeddings)
    batch, num_words = image_embeddings.shape[0], text_embeddings.shape[0]
    check_selection(batch, num_words, num_selected, required)
    if num_words <= num_selected:
        return torch.arange(num_words, device=image_embeddings.device).repeat(batch, 1)
    votes = class_votes(image_embeddings, text_embeddings, backend=backend)
    return select_classes(votes, num_selected, required)
