"""The published decoder's forward pass, and that of the yardstick, over the fused operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errseg import ops
from errseg.accelerated.fused import Fused
from errseg.accelerated.view import DecoderView
from errseg.model.clip import DenseFeatures
from errseg.model.decoder import Decoder, DecoderOutput
from errseg.ops.checks import expect


class FusedYardstick(Fused):
    """In front of `errseg.testing.PublishedDecoder`."""

    fused_state: DecoderView

    def forward(self, features: Any, text_embeddings: Tensor, **options: Any) -> DecoderOutput:
        """As :meth:`errseg.Decoder.forward`."""
        return self.fused_state.current()(DenseFeatures(*features), text_embeddings, **options)


class FusedDecoder(Fused):
    """In front of the published `Decoder`."""

    fused_state: DecoderView
    K: int

    def forward(
        self,
        img_feats: Sequence[Tensor],
        text_feats: Tensor,
        img_guidances: Sequence[Tensor],
        gt_classes: Sequence[Tensor] | Tensor | None,
        *,
        dense: bool = True,
    ) -> Tensor | DecoderOutput:
        """Segment by words, in the published arrangement.

        Args:
            img_feats: pixel embeddings [B, D, H, W] at 1/16 and [B, D, H/2, W/2] at 1/32 of the image.
            text_feats: [B, T, 1, D] word embeddings, one prompt, image by image.
            img_guidances: taps at 1/32, 1/16, 1/8 and 1/4; they are left as they are.
            gt_classes: in training the class ids of each image, or which they are as [B, T] bool; else not looked at.
            dense: all T classes or the K alone.

        Returns:
            float32 logits [B, T, 4H, 4W] with -100 for classes that were not selected, as published; without `dense`
            the logits of the K classes and their ids, ascending.

        Raises:
            ValueError: on wrong shapes, or without `gt_classes` in training.
            ErrSegError: when a layer has been replaced since `errseg.accelerate`.
        """
        batch, words = img_feats[0].shape[0], text_feats.shape[1]
        expect(text_feats.ndim == 4 and text_feats.shape[2] == 1, "text_feats [B, T, 1, D]", text_feats)
        features = DenseFeatures(*reversed(img_guidances), *img_feats)
        required = class_membership(gt_classes, batch, words, text_feats.device) if self.training else None
        output = _segment(self.fused_state.current(), features, text_feats[:, :, 0], self.K, required)
        if not dense:
            return output
        return DecoderOutput(output.logits.float(), output.class_ids).dense(words)


def class_membership(gt_classes: Any, batch: int, words: int, device: torch.device) -> Tensor:
    """Lists of class ids, one per image, to [B, T] bool; such a tensor passes as it is."""
    if isinstance(gt_classes, Tensor):
        return gt_classes
    expect(gt_classes is not None and len(gt_classes) == batch, f"gt_classes of {batch} images", gt_classes)
    required = torch.zeros(batch, words, dtype=torch.bool, device=device)
    for image, ids in zip(required, gt_classes, strict=True):
        image.index_fill_(0, ids.to(device, torch.int64), True)
    return required


def _segment(
    decoder: Decoder, features: DenseFeatures, text: Tensor, num_selected: int, required: Tensor | None
) -> DecoderOutput:
    """Words [B, T, D] may differ from image to image, which nobody can see without looking at them.

    Rows repeated without a copy are one vocabulary; otherwise all rows become one vocabulary of B T words, of which
    each image selects among its own.
    """
    batch, words = text.shape[:2]
    if batch == 1 or text.stride(0) == 0:
        return decoder(features, text[0], num_selected=num_selected, required=required)
    ids = [
        ops.reduce_vocabulary(
            features.os16_dense[i : i + 1], text[i], num_selected, None if required is None else required[i : i + 1]
        )
        for i in range(batch)
    ]
    class_ids = torch.cat(ids)
    offsets = torch.arange(0, batch * words, words, device=class_ids.device)[:, None]
    output = decoder(features, text.flatten(0, 1), num_selected=num_selected, class_ids=class_ids + offsets)
    return DecoderOutput(output.logits, class_ids)
