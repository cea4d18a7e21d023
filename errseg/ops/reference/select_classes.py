"""Top K by integer keys: exact tie rule, no synchronisation, no more than twice the memory of the votes."""

from __future__ import annotations

import torch
from torch import Tensor


def select_classes(votes: Tensor, num_selected: int, required: Tensor | None) -> Tensor:
    """[B, T] int64, [B, T] bool -> [B, min(K, T)] int64 ascending; see :func:`errseg.ops.select_classes`."""
    num_words = votes.shape[1]
    num_selected = min(num_selected, num_words)
    # The largest key has most votes, and of equal votes the lowest id.
    selected = _lowest_first(num_words, votes).add(votes, alpha=num_words).topk(num_selected, dim=1).indices
    if required is not None:
        # Required before voted before the rest, the lowest ids first within each.
        keys = required * (2 * num_words)
        keys.scatter_(1, selected, keys.gather(1, selected).clamp(min=num_words))
        selected = keys.add_(_lowest_first(num_words, votes)).topk(num_selected, dim=1).indices
    return selected.sort(dim=1).values


def _lowest_first(num_words: int, votes: Tensor) -> Tensor:
    """T - 1 .. 0."""
    return torch.arange(num_words - 1, -1, -1, dtype=votes.dtype, device=votes.device)
