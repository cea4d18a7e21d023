"""The published meta-architecture: picture to loss, and picture to label scores, over the K classes alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops
from errseg.accelerated.fused import Fused
from errseg.accelerated.head import FusedHead
from errseg.model.decoder import DecoderOutput

Record = dict[str, Any]
"""One image as detectron2 hands it over: `image` [3, H, W] 0..255, `sem_seg` [H, W] in training, `height`, `width`."""


class FusedModel(Fused):
    """In front of the published `ERRSeg`."""

    sem_seg_head: FusedHead
    clip_pixel_mean: Tensor
    clip_pixel_std: Tensor
    clip_resolution: tuple[int, int]
    size_divisibility: int
    ignore_value: int

    def forward(self, batched_inputs: list[Record]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, `{"loss_sem_seg_0": scalar}`; otherwise for each image `{"sem_seg": [T, height, width]}`.

        Scores are probabilities of the selected classes and 0 for all others.
        """
        if self.training:
            return {"loss_sem_seg_0": self._loss(batched_inputs)}
        return [{"sem_seg": self._scores(record)} for record in batched_inputs]

    def _loss(self, records: list[Record]) -> Tensor:
        target = torch.stack([record["sem_seg"] for record in records]).to(self.clip_pixel_mean.device)
        words = len(self.sem_seg_head.words())
        present = classes_in(target, words, self.ignore_value)
        output = self._segment(self._pictures(records, self.size_divisibility), present)
        return ops.upsample_bce(
            output.logits, output.class_ids, target, vocabulary_size=words, ignore_index=self.ignore_value
        )

    def _scores(self, record: Record) -> Tensor:
        picture = self._pictures([record], 0)
        output = self._segment(picture, None)
        height, width = picture.shape[2:]
        scores = output.logits.float().sigmoid()[:, :, :height, :width]
        size = (record.get("height", height), record.get("width", width))
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores.new_zeros(len(self.sem_seg_head.words()), *size).index_copy_(0, output.class_ids[0], scores[0])

    def _pictures(self, records: list[Record], divisor: int) -> Tensor:
        """Normalised, with zeros to the right and below up to one size that `divisor` divides: [B, 3, H, W]."""
        mean, std = self.clip_pixel_mean, self.clip_pixel_std
        images = [(record["image"].to(mean.device) - mean) / std for record in records]
        sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
        if divisor > 1:
            sides = [-(-side // divisor) * divisor for side in sides]
        return torch.stack([F.pad(i, (0, sides[1] - i.shape[2], 0, sides[0] - i.shape[1])) for i in images])

    def _segment(self, pictures: Tensor, present: Tensor | None) -> DecoderOutput:
        resized = F.interpolate(pictures, size=self.clip_resolution, mode="bilinear", align_corners=False)
        maps = self.sem_seg_head.clip_model.encode_image(resized, dense=True)
        taps = [maps[name] for name in ("os4", "os8", "os16", "os32")]
        output = self.sem_seg_head(maps["clip_vis_dense"], [maps["os16_dense"]], taps, present, dense=False)
        assert isinstance(output, DecoderOutput)
        return output


def classes_in(target: Tensor, words: int, ignore_index: int) -> Tensor:
    """Which of T classes each label map [B, H, W] shows: [B, T] bool, without a host synchronisation."""
    known = (target != ignore_index) & (target >= 0) & (target < words)
    ids = torch.where(known, target, words).flatten(1).long()
    present = torch.zeros(len(target), words + 1, dtype=torch.bool, device=target.device)
    return present.scatter_(1, ids, True)[:, :words]
