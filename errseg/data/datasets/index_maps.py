"""Files of class indices: read with every fault named, and checked against the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from errseg.errors import ErrSegError

_MODES = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I": np.int32}


def open_pixels(path: Path) -> tuple[NDArray[Any], str]:
    """Pixels of a picture file as they are stored, without EXIF rotation, and Pillow's mode.

    Raises:
        ErrSegError: naming the file, when it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image), image.mode
    except FileNotFoundError as error:
        raise ErrSegError(f"{path}: no such file") from error
    except PermissionError as error:
        raise ErrSegError(f"{path}: no permission to read it") from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        # What Pillow's decoders raise on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ErrSegError(f"{path}: unreadable, truncated or damaged ({reason})") from error


def read_index_map(path: Path) -> NDArray[Any]:
    """Class indices [H, W] of a grey or palette PNG (uint8), a 16-bit PNG or TIFF (uint16), or a 32-bit one (int32).

    Raises:
        ErrSegError: naming the file, when it cannot be read or holds colours.
    """
    pixels, mode = open_pixels(path)
    if mode not in _MODES or pixels.ndim != 2:
        raise ErrSegError(f"{path}: not a map of class indices (pixels of kind {mode}, expected grey or palette)")
    return pixels.astype(_MODES[mode], copy=False)


def label_values(labels: NDArray[Any]) -> NDArray[np.int64]:
    """The different values of a label map, ascending."""
    if labels.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(labels.ravel()))  # much quicker than sorting
    return np.unique(labels).astype(np.int64)


def check_range(values: NDArray[np.int64], num_classes: int, ignore: int, path: Path) -> None:
    """Raise ErrSegError, naming the file, for a value that is neither a class nor the ignored one."""
    wrong = values[((values < 0) | (values >= num_classes)) & (values != ignore)]
    if len(wrong):
        raise ErrSegError(
            f"{path}: label {wrong[0]} is out of range (classes 0 to {num_classes - 1}, ignored {ignore})"
        )
