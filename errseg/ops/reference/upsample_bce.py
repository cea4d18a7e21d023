"""The loss over all T classes from the logits of K."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops.precision import without_autocast
from errseg.ops.reference.upsample_argmax import score_dtype

MISSED_COST = 100.0  # softplus of minus the logit -100 that an unselected class stands for


@without_autocast
def upsample_bce(
    logits: Tensor,
    class_ids: Tensor,
    target: Tensor,
    vocabulary_size: int,
    ignore_index: int,
    exclude_ignored: bool,
) -> Tensor:
    """[B, K, h, w], [B, K], [B, H, W] -> scalar; see :func:`errseg.ops.upsample_bce`."""
    target = target.to(torch.int64)
    valid = (target != ignore_index) & (target >= 0) & (target < vocabulary_size)
    upsampled = F.interpolate(
        logits.to(score_dtype(logits)), size=target.shape[1:], mode="bilinear", align_corners=False
    )
    positive = (target[:, None] == class_ids[:, :, None, None]) & valid[:, None]  # [B, K, H, W]
    selected_cost = F.binary_cross_entropy_with_logits(upsampled, positive.to(upsampled.dtype), reduction="none")
    missed = valid & ~positive.any(dim=1)
    if exclude_ignored:
        selected_cost = selected_cost * valid[:, None]
        num_pixels = valid.sum().clamp_min(1).to(upsampled.dtype)
    else:
        num_pixels = upsampled.new_tensor(max(1, target.numel()))
    total = selected_cost.sum() + MISSED_COST * missed.sum().to(upsampled.dtype)
    return total / (num_pixels * vocabulary_size)
