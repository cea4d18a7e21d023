"""The result of segmenting one picture: labels, and what can be done with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from errseg.data.labels import areas, save_image, save_json, save_labels
from errseg.data.overlay import draw_overlay, word_colors


@dataclass
class Segmentation:
    """The words of one picture.

    labels: [H, W] int32 on the CPU, index into `vocabulary`, at the picture's own (upright) size; -1 = unknown.
    scores: [H, W] float32, the winning probability in [0, 1], or None when not asked for.
    vocabulary: the words offered, and "background" last where background words were given.
    class_ids: [K] int64 ascending, the words that the picture was reduced to.
    image: the picture as it was read. source: its path, if it had one.
    timings: seconds per stage (`errseg.timing.STAGES`), or None when not asked for; a batch shares evenly.
    """

    labels: Tensor
    scores: Tensor | None
    vocabulary: list[str]
    class_ids: Tensor
    image: Image.Image = field(repr=False)
    source: str | None = None
    timings: dict[str, float] | None = None

    def overlay(self, **options: Any) -> Image.Image:
        """Colours, outlines and names over the picture; options as in `errseg.data.overlay.draw_overlay`."""
        return draw_overlay(self.image, self.labels.numpy(), self.vocabulary, **options)

    def areas(self) -> list[dict[str, Any]]:
        """[{id, word, pixels, fraction}] of the words found, largest first, unknown (id -1) last."""
        return areas(self.labels.numpy(), self.vocabulary)

    def save(self, path: str | PathLike[str], *, overlay: bool = True) -> list[Path]:
        """Write the label map, a JSON of areas and the overlay; return their paths.

        `out.png` (or `out.labels.png`) goes with `out.json` and `out.overlay.png`. With more than 65,535 words
        the label map is a .tif (`errseg.data.labels.save_labels`).

        Raises:
            ErrSegError: a file cannot be written.
        """
        target = Path(path)
        stem = target.with_name(target.stem.removesuffix(".labels"))
        colors = word_colors(self.vocabulary) if len(self.vocabulary) <= 255 else None
        written = [save_labels(self.labels.numpy(), target, len(self.vocabulary), colors)]
        if overlay:
            written.append(stem.with_name(stem.name + ".overlay.png"))
            save_image(self.overlay(), written[-1], compress_level=1)  # a sixth of the time for a sixth more bytes
        facts = {
            "image": self.source,
            "width": self.image.width,
            "height": self.image.height,
            "labels": written[0].name,
            "overlay": written[1].name if overlay else None,
            "vocabulary_size": len(self.vocabulary),
            "selected": [{"id": i, "word": self.vocabulary[i]} for i in self.class_ids.tolist()],
            "areas": self.areas(),
        }
        written.append(stem.with_name(stem.name + ".json"))
        save_json(facts, written[-1])
        return written
