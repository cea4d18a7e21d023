"""Pictures whose results are on the disk already: a run that was interrupted need not do them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def is_finished(picture: str, target: Path, words: Sequence[str], *, overlay: bool) -> bool:
    """Whether `Segmentation.save(target, overlay=...)` has written all of its files for this picture and these words.

    Its JSON comes last, and each file is whole or absent. Model and settings are not on record there.

    Args:
        picture: the path by which it was read.
        target: the label map, `NAME.labels.png`.
        words: the vocabulary of the results, "background" included where there is one.
        overlay: whether the overlay is asked for too.
    """
    stem = target.name.removesuffix(".labels.png")
    try:
        facts = json.loads(target.with_name(f"{stem}.json").read_bytes())
        named = {entry["id"]: entry["word"] for entry in (*facts["selected"], *facts["areas"]) if entry["id"] >= 0}
        if facts["image"] != picture or facts["vocabulary_size"] != len(words):
            return False
        if any(words[number] != word for number, word in named.items()):
            return False
        with Image.open(target.with_name(facts["labels"])) as labels:  # its header
            size = labels.size
        there = not overlay or target.with_name(facts["overlay"]).is_file()
    except (OSError, ValueError, LookupError, TypeError):  # nothing there, or something else
        return False
    return there and size == (facts["width"], facts["height"])
