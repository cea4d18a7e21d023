"""Training batches of toy scenes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from errseg.data.toy import TRAINING_IDS, WORDS

_TO_TRAINING = np.full(len(WORDS), 255, dtype=np.uint8)
_TO_TRAINING[list(TRAINING_IDS)] = np.arange(len(TRAINING_IDS))


def training_tensors(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Images [N, S, S, 3] as [N, 3, S, S]; labels [N, S, S] into `WORDS` as labels into `TRAINING_IDS`."""
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(_TO_TRAINING[labels])


def scene_batches(
    images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches: images [B, 3, S, S] float32 in 0..255, labels [B, S, S] int64.

    Each scene is mirrored with probability 0.5, scaled in brightness by 0.85 to 1.15, and its channels shifted
    by up to 10 each.
    """
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(chosen) < batch_size:
                break
            batch, target = images[chosen].float(), labels[chosen].long()
            mirrored = torch.rand(batch_size, generator=generator) < 0.5
            batch[mirrored], target[mirrored] = batch[mirrored].flip(-1), target[mirrored].flip(-1)
            gain = 0.85 + 0.3 * torch.rand(batch_size, 1, 1, 1, generator=generator)
            shift = 20 * torch.rand(batch_size, 3, 1, 1, generator=generator) - 10
            yield (batch * gain + shift).clamp_(0, 255), target
