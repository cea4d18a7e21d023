"""Losses that need no pre-trained towers: cross-entropy against the mixture of classes in each cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_fractions(labels: Tensor, num_classes: int, cell: int) -> Tensor:
    """Share of every class among the pixels of every square cell.

    Args:
        labels: [B, H, W] int64 class indices, H and W multiples of `cell`.
        num_classes: T.
        cell: side of a cell in pixels.

    Returns:
        [B, T, H/cell, W/cell] float32; sums to 1 over T.
    """
    batch, height, width = labels.shape
    if height % cell or width % cell:
        raise ValueError(f"expected a label map whose sides divide by {cell}, got {height} x {width}")
    rows, columns = height // cell, width // cell
    cells = torch.arange(batch * rows * columns, device=labels.device).view(batch, rows, columns)
    cells = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    size = batch * rows * columns * num_classes
    counts = torch.bincount((cells * num_classes + labels).flatten(), minlength=size)
    return counts.view(batch, rows, columns, num_classes).permute(0, 3, 1, 2).float() / cell**2


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over cells of the cross-entropy between a target mixture and softmax(logits).

    Args:
        logits: [B, T, h, w].
        target: [B, T, h, w] shares of the classes, summing to at most 1.
        weight: [B, h, w] weight of every cell.
    """
    entropy = -(target * F.log_softmax(logits.float(), 1)).sum(1)
    return (entropy * weight).sum() / weight.sum()
