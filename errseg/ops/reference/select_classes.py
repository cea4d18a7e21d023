"""Top K by integer keys: exact tie rule, no synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def select_classes(votes: Tensor, num_selected: int, required: Tensor | None) -> Tensor:
    """[B, T] int64, [B, T] bool -> [B, min(K, T)] int64 ascending; see :func:`errseg.ops.select_classes`."""
    num_words = votes.shape[1]
    num_selected = min(num_selected, num_words)
    lowest_first = num_words - 1 - torch.arange(num_words, device=votes.device)
    selected = (votes * num_words + lowest_first).topk(num_selected, dim=1).indices
    if required is not None:
        voted = torch.zeros_like(required).scatter(1, selected, True)
        rank = 2 * required.to(votes.dtype) + voted
        # Required before voted before the rest, ascending ids within each.
        selected = (rank.clamp(max=2) * num_words + lowest_first).topk(num_selected, dim=1).indices
    return selected.sort(dim=1).values
