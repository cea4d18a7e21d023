"""Cosines of the selected words alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg.ops.precision import at_least_float32


def cost_volume(image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor | None) -> Tensor:
    """[B, D, H, W], [T, D], [B, K] -> [B, K, H, W]; see :func:`errseg.ops.cost_volume`."""
    batch, _, height, width = image_embeddings.shape
    text = text_embeddings[None].expand(batch, -1, -1) if class_ids is None else text_embeddings[class_ids]
    text = F.normalize(at_least_float32(text), dim=-1, eps=1e-12).to(image_embeddings.dtype)
    pixels = image_embeddings.flatten(2)
    lengths = at_least_float32(pixels).norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = torch.bmm(text, pixels) / lengths.to(pixels.dtype)
    return cosines.to(image_embeddings.dtype).unflatten(2, (height, width))
