"""Label maps as files: written whole or not at all, and read back."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from errseg.data.overlay import UInt8Array
from errseg.errors import ErrSegError

Int32Array = npt.NDArray[np.int32]

# Words that fit in a palette PNG and a 16-bit PNG beside unknown, the largest value of each type.
PALETTE_WORDS = 255
SHORT_WORDS = 65_535
UNKNOWN_PALETTE, UNKNOWN_SHORT, UNKNOWN_LONG = 255, 65_535, 2**31 - 1


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path` if the block succeeds and vanishes if not.

    Raises:
        ErrSegError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ErrSegError(f"cannot write {target}: {error.strerror or error}") from error
        raise


def save_image(image: Image.Image, path: str | PathLike[str], **options: Any) -> None:
    """Write a picture whole or not at all, in the format of its suffix."""
    suffix = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    if kind is None or kind not in Image.SAVE:
        raise ErrSegError(f"cannot write {path}: {suffix or 'no suffix'} is not a picture format; use .png")
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **options)


def label_suffix(num_words: int) -> str:
    """Return the suffix that holds so many words beside unknown: ".png" up to 65,535, ".tif" beyond."""
    return ".png" if num_words <= SHORT_WORDS else ".tif"


def save_labels(labels: Any, path: str | PathLike[str], num_words: int, colors: UInt8Array | None = None) -> Path:
    """Write a label map, -1 as the largest value of the type, and return its path.

    Palette PNG up to 255 words (unknown 255, black), 16-bit PNG up to 65,535 (unknown 65,535), signed 32-bit
    TIFF beyond (unknown 2,147,483,647); the path's suffix is set to match.

    Args:
        labels: [H, W] integers from -1 to num_words - 1.
        path: where to; a suffix other than .png or .tif is an error.
        num_words: size of the vocabulary.
        colors: [num_words, 3] uint8 for the palette.

    Raises:
        ErrSegError: another suffix, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".png", ".tif", ".tiff"):
        raise ErrSegError(f"cannot write {target}: label maps are .png or .tif files")
    target = target.with_suffix(label_suffix(num_words))
    image, options = _label_image(labels, num_words, colors)
    save_image(image, target, **options)
    return target


def encode_labels(labels: Any, num_words: int, colors: UInt8Array | None = None) -> bytes:
    """Return the bytes of the file that `save_labels` writes; arguments as there."""
    image, options = _label_image(labels, num_words, colors)
    kind = Image.registered_extensions()[label_suffix(num_words)]
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def _label_image(labels: Any, num_words: int, colors: UInt8Array | None) -> tuple[Image.Image, dict[str, Any]]:
    """A label map as an image, and how to save it."""
    values = np.asarray(labels)
    unknown = values < 0
    if num_words <= PALETTE_WORDS:
        image = Image.fromarray(np.where(unknown, UNKNOWN_PALETTE, values).astype(np.uint8))
        table = np.zeros((256, 3), np.uint8)
        if colors is not None:
            table[:num_words] = colors[:num_words]
        image.putpalette(table.tobytes())
        return image, {}
    if num_words <= SHORT_WORDS:
        return Image.fromarray(np.where(unknown, UNKNOWN_SHORT, values).astype(np.uint16)), {}
    image = Image.fromarray(np.where(unknown, UNKNOWN_LONG, values).astype(np.int32))
    return image, {"compression": "tiff_adobe_deflate"}


def load_labels(path: str | PathLike[str] | IO[bytes]) -> Int32Array:
    """Read a label map of `save_labels` or, from an open file, `encode_labels`: [H, W] int32, -1 = unknown."""
    with Image.open(path) as image:
        mode, kind = image.mode, image.format
        values = np.asarray(image).astype(np.int32)
    unknown = {"P": UNKNOWN_PALETTE, "I;16": UNKNOWN_SHORT, "I": UNKNOWN_LONG}
    if mode == "I" and kind == "PNG":  # older Pillow opens 16-bit PNG files so
        mode = "I;16"
    if mode not in unknown:
        raise ErrSegError(f"{path}: not a label map (pixels of kind {mode})")
    return np.where(values == unknown[mode], -1, values).astype(np.int32)


def areas(labels: Any, vocabulary: Sequence[str]) -> list[dict[str, Any]]:
    """Return [{id, word, pixels, fraction}] of a label map's words, largest first, unknown (id -1) last."""
    values = np.asarray(labels)
    ids, counts = np.unique(values, return_counts=True)
    order = np.lexsort((ids, -counts, ids < 0))
    return [
        {
            "id": int(ids[i]),
            "word": vocabulary[ids[i]] if ids[i] >= 0 else None,
            "pixels": int(counts[i]),
            "fraction": round(float(counts[i]) / values.size, 6),
        }
        for i in order
    ]


def save_json(facts: dict[str, Any], path: str | PathLike[str]) -> None:
    """Write one JSON object whole or not at all."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        # File names need not be valid text: what is not becomes a JSON escape.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
