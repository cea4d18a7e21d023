"""Scores of a toy model on fresh scenes: the full head beside the plain argmax of the cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from errseg.data.toy import BACKGROUND_IDS, SEEN_IDS, UNSEEN_IDS, WORDS, ToyWorld
from errseg.eval.metrics import Metrics, confusion_matrix
from errseg.model.errseg import ERRSeg
from errseg.ops import cost_volume, upsample_argmax

TEST_SEED = 777


@dataclass(frozen=True)
class Scores:
    """A confusion matrix over the words [T, T], and per word the objects named right and all objects."""

    confusion: NDArray[np.int64]
    named: NDArray[np.int64]  # [T, 2]

    def miou(self, ids: Iterable[int]) -> float:
        """Mean IoU in percent over those of the classes `ids` that the ground truth shows."""
        metrics = Metrics(self.confusion)
        return float(np.mean(metrics.iou[[i for i in ids if metrics.true[i]]]))

    def pixel_accuracy(self, ids: Iterable[int]) -> float:
        """Share in percent of the pixels of the true classes `ids` that are labelled right."""
        rows = list(ids)
        return 100 * float(np.diag(self.confusion)[rows].sum() / self.confusion[rows].sum())

    def objects_named(self, ids: Iterable[int]) -> float:
        """Share in percent of the objects of the classes `ids` whose own pixels are mostly labelled right."""
        right, total = self.named[list(ids)].sum(0)
        return 100 * float(right / total)


class Prediction(NamedTuple):
    """Label maps [B, H, W] int32 of the full head and of the raw cosines."""

    head: NDArray[np.int32]
    raw: NDArray[np.int32]


@torch.inference_mode()
def predict(
    model: ERRSeg,
    images: Tensor,
    text_embeddings: Tensor,
    *,
    num_selected: int | None = None,
    size: tuple[int, int] | None = None,
) -> Prediction:
    """Label images [B, 3, S, S] in 0..255 with the words of `text_embeddings` [T, D], in two ways.

    `num_selected` is K, by default the model's; `size` (H, W) that of the label maps, by default the images'.
    """
    size = size or (images.shape[2], images.shape[3])
    features = model.clip(model.normalize(images))
    cosines = cost_volume(features.os16_dense, text_embeddings)
    raw = F.interpolate(cosines, size=size, mode="bilinear", align_corners=False).argmax(1)
    output = model.decoder(features, text_embeddings, num_selected=num_selected or model.config.num_selected or 16)
    head = upsample_argmax(output.logits, output.class_ids, size)
    assert isinstance(head, Tensor)
    return Prediction(head.cpu().numpy(), raw.int().cpu().numpy())


def evaluate(
    model: ERRSeg,
    *,
    scenes: int = 200,
    seed: int = TEST_SEED,
    num_selected: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Scores]:
    """Scores over fresh scenes with all 168 words, half of the objects unseen: {"head": ..., "raw": ...}."""
    world = ToyWorld(seed, size=model.config.size, unseen=0.5)
    text = model.clip.embed_words(WORDS, prompt=model.config.prompt)
    size = len(WORDS)
    confusion = {name: np.zeros((size, size), dtype=np.int64) for name in Prediction._fields}
    named = {name: np.zeros((size, 2), dtype=np.int64) for name in Prediction._fields}
    for start in range(0, scenes, batch_size):
        batch = [world[i] for i in range(start, min(start + batch_size, scenes))]
        images = to_tensor([scene.image for scene in batch]).to(text.device)
        prediction = predict(model, images, text, num_selected=num_selected)
        for name, maps in prediction._asdict().items():
            for scene, labels in zip(batch, maps, strict=True):
                matrix = confusion_matrix(scene.labels, labels, size)
                confusion[name] += matrix
                shown = np.flatnonzero(matrix.sum(1))
                named[name][shown, 0] += matrix[shown].argmax(1) == shown
                named[name][shown, 1] += 1
        if progress is not None:
            progress(start + len(batch), scenes)
    return {name: Scores(confusion[name], named[name]) for name in Prediction._fields}


def to_tensor(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures uint8 [H, W, 3] of one size as one float tensor [B, 3, H, W] in 0..255, channels last."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def summary(scores: Scores) -> dict[str, float]:
    """The numbers that the demo prints, in percent."""
    objects = SEEN_IDS + UNSEEN_IDS
    return {
        "miou_all": scores.miou(range(len(WORDS))),
        "miou_backgrounds": scores.miou(BACKGROUND_IDS),
        "miou_seen": scores.miou(SEEN_IDS),
        "miou_unseen": scores.miou(UNSEEN_IDS),
        "accuracy_all": scores.pixel_accuracy(range(len(WORDS))),
        "accuracy_objects": scores.pixel_accuracy(objects),
        "accuracy_seen": scores.pixel_accuracy(SEEN_IDS),
        "accuracy_unseen": scores.pixel_accuracy(UNSEEN_IDS),
        "named_seen": scores.objects_named(SEEN_IDS),
        "named_unseen": scores.objects_named(UNSEEN_IDS),
    }
