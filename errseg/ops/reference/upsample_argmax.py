"""Running maximum over groups of classes: memory of a few label maps, whatever K is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops.precision import without_autocast

GROUP_ELEMENTS = 8 << 20  # upsampled probabilities held at a time: 32 MiB in float32


def score_dtype(logits: Tensor) -> torch.dtype:
    """Probabilities and losses are float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


@without_autocast
def upsample_argmax(
    logits: Tensor, class_ids: Tensor, height: int, width: int, return_scores: bool
) -> tuple[Tensor, Tensor]:
    """[B, K, h, w], [B, K] -> labels [B, H, W], scores likewise or empty; see :func:`errseg.ops.upsample_argmax`."""
    batch, num_classes = class_ids.shape
    class_ids, order = class_ids.sort(dim=1)
    probabilities = logits.to(score_dtype(logits)).sigmoid().gather(1, order[:, :, None, None].expand_as(logits))
    group = max(1, GROUP_ELEMENTS // max(1, batch * height * width))
    labels = class_ids.new_empty((batch, height, width), dtype=torch.int32)
    scores = probabilities.new_full((batch, height, width), -1.0)
    for start in range(0, num_classes, group):
        some = probabilities[:, start : start + group]
        maps = F.interpolate(some, size=(height, width), mode="bilinear", align_corners=False)
        best, row = maps.max(dim=1)  # the first of equal ones: the lowest id
        ids = class_ids[:, start : start + group].gather(1, row.flatten(1)).reshape(row.shape).to(torch.int32)
        better = best > scores
        labels = torch.where(better, ids, labels)
        scores = torch.where(better, best, scores)
    return labels, scores if return_scores else scores.new_empty(0)
