"""From a picture of any size and its label map to a square for training, as the published recipe does it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from errseg.data.images import resized
from errseg.train.colour import Jitter
from errseg.train.settings import TrainSettings

PADDING, IGNORED = 128, -1


@dataclass(frozen=True)
class Augmentation:
    """Resize, random crop, colour jitter, mirror, pad: everything random comes from the generator of a call."""

    size: int  # S
    short_edge: int
    max_edge: int
    colour_jitter: bool
    flip: bool

    @classmethod
    def of(cls, settings: TrainSettings, size: int) -> Augmentation:
        return cls(size, settings.short_edge or size, settings.max_edge, settings.colour_jitter, settings.flip)

    def __call__(
        self, picture: Image.Image, labels: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """RGB picture and labels [H, W] (-1 ignored) -> uint8 [3, S, S], int32 [S, S]."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        height, width = resized(picture.height, picture.width, self.short_edge, self.max_edge)
        # Pillow's bilinear filter for the picture, PyTorch's nearest (the lower neighbour) for the labels.
        picture = functional.resize(picture, [height, width], InterpolationMode.BILINEAR)
        target = functional.resize(torch.from_numpy(labels)[None], [height, width], InterpolationMode.NEAREST)
        rows, columns = min(height, self.size), min(width, self.size)
        top, left = (int(rng.integers(edge - kept + 1)) for edge, kept in ((height, rows), (width, columns)))
        pixels = np.asarray(functional.crop(picture, top, left, rows, columns))
        target = functional.crop(target, top, left, rows, columns)
        if self.colour_jitter:
            pixels = Jitter.draw(rng).apply(pixels)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.flip and rng.random() < 0.5:
            image, target = functional.horizontal_flip(image), functional.horizontal_flip(target)
        right_and_below = [0, 0, self.size - columns, self.size - rows]
        image = functional.pad(image, right_and_below, fill=PADDING)
        return image, functional.pad(target, right_and_below, fill=IGNORED)[0].int()
