"""Votes over tiles of words: no T x H x W tensor, no synchronisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops.precision import at_least_float32, without_autocast

VOTE_DTYPE = torch.int64
VOTE_WEIGHTS = (100, 10, 1)
TILE_ELEMENTS = 4 << 20  # scores held at a time, and numbers of words: 16 MiB each in float32
GROUP = 64  # words; whole groups keep the BLAS on one path, so that equal words get equal scores


@without_autocast
def class_votes(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """[B, D, H, W], [T, D] -> [B, T] int64; see :func:`errseg.ops.class_votes`."""
    num_words = text_embeddings.shape[0]
    ranks = min(len(VOTE_WEIGHTS), num_words)
    votes = torch.zeros((image_embeddings.shape[0], num_words), dtype=VOTE_DTYPE, device=image_embeddings.device)
    for image, image_votes in zip(image_embeddings.flatten(2), votes, strict=True):
        winners = _top_words(at_least_float32(image), text_embeddings, ranks)
        for weight, winner in zip(VOTE_WEIGHTS, winners, strict=False):
            image_votes.scatter_add_(0, winner, torch.full_like(winner, weight))
    return votes


def _top_words(pixels: Tensor, text_embeddings: Tensor, ranks: int) -> Tensor:
    """[D, P], [T, D] -> ids [ranks, P] of the best words, best first, equal scores by ascending id."""
    num_words, (channels, num_pixels) = text_embeddings.shape[0], pixels.shape
    tile = max(GROUP, TILE_ELEMENTS // max(1, channels, num_pixels) // GROUP * GROUP)
    scores = pixels.new_empty((0, num_pixels))
    ids = torch.empty((0, num_pixels), dtype=VOTE_DTYPE, device=pixels.device)
    for start in range(0, num_words, tile):
        tile_scores, tile_ids = _candidates(pixels, text_embeddings[start : start + tile], ranks)
        # Earlier words come first, and the first of equal scores wins: ties go to the lowest id.
        scores, ids = torch.cat((scores, tile_scores)), torch.cat((ids, tile_ids + start))
        scores, rows = _top_rows(scores, ranks)
        ids = ids.gather(0, rows)
    return ids


def _candidates(pixels: Tensor, words: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """[D, P], [t, D] -> scores and ascending ids, both [3 GROUP, P] or smaller: the best ``ranks`` are among them.

    A word among the best is in one of the ``ranks`` groups with the largest maxima, earlier groups first.
    """
    num_words = words.shape[0]
    words = F.normalize(words.to(pixels.dtype), dim=1, eps=1e-12)
    if num_words % GROUP:
        words = F.pad(words, (0, 0, 0, -num_words % GROUP))
    scores = words @ pixels  # [whole groups, P]
    scores[num_words:] = float("-inf")
    _, groups = _top_rows(scores.unflatten(0, (-1, GROUP)).amax(1), ranks)
    groups = groups.sort(dim=0).values
    ids = (groups[:, None] * GROUP + torch.arange(GROUP, device=groups.device)[:, None]).flatten(0, 1)
    return scores.gather(0, ids), ids


def _top_rows(scores: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """The largest ``ranks`` entries of each column, in order, the first of equal ones first; overwrites ``scores``."""
    values, rows = [], []
    for _ in range(min(ranks, scores.shape[0])):
        value, row = scores.max(dim=0)
        values.append(value)
        rows.append(row)
        scores.scatter_(0, row[None], float("-inf"))
    return torch.stack(values), torch.stack(rows)
