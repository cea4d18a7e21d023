"""Maps pixel by pixel, a slab at a time, and sums over slabs: what bounds the memory of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def parts(batch: int, num_pixels: int, pixel_bytes: int, slab_bytes: int) -> Iterator[tuple[slice, int, int]]:
    """Images, first pixel and number of pixels of slabs: several images, or a part of one."""
    pixels = max(1, slab_bytes // pixel_bytes)
    images = max(1, pixels // num_pixels)
    for image in range(0, batch, images):
        for first in range(0, num_pixels, pixels):
            yield slice(image, min(image + images, batch)), first, min(pixels, num_pixels - first)


def rows(maps: Tensor, pixel_bytes: int, slab_bytes: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Slabs of maps [B, K, h, w, C] pixel by pixel, with image and pixels: [N, K, C]."""
    batch, _, height, width, _ = maps.shape
    pixels = max(1, slab_bytes // pixel_bytes)
    for image in range(batch):
        for first in range(0, height * width, pixels):
            part = slice(first, min(first + pixels, height * width))
            yield image, part, of_pixels(maps, image, part).transpose(0, 1).contiguous()


def of_pixels(maps: Tensor, image: int, pixels: slice) -> Tensor:
    """A view of some pixels of maps [B, K, h, w, C]: [K, N, C]."""
    return maps[image].flatten(1, 2)[:, pixels]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right``, summed in the dtype of ``total``; nothing where ``total`` is empty."""
    if not total.numel():
        return
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:  # kernels that are emulated or interpreted
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def add_sum(total: Tensor, left: Tensor) -> None:
    """``total`` plus the sum of rows, likewise."""
    if total.numel():
        total += left.sum(0, dtype=total.dtype)
