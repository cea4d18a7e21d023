"""Label rules: what every raw 8-bit value of the original label maps becomes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IGNORE = 255
ILLEGAL = -1  # in a rule: no original file holds this value

# Raw ids up to 181 that COCO-Stuff never uses.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO_RAW = 182

# PASCAL-Context categories that the 59 classes are made of: their rank is the class.
CONTEXT_59 = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
CONTEXT_RAW = 459


def _rule(default: int, known: dict[int, int]) -> NDArray[np.int16]:
    table = np.full(256, default, np.int16)
    table[list(known)] = list(known.values())
    table.flags.writeable = False
    return table


def _coco() -> NDArray[np.int16]:
    used = [raw for raw in range(_COCO_RAW) if raw not in _COCO_UNUSED]
    ignored = dict.fromkeys((*_COCO_UNUSED, 255), IGNORE)
    return _rule(ILLEGAL, {raw: rank for rank, raw in enumerate(used)} | ignored)


_OBJECTS = {raw: raw - 1 for raw in range(1, 21)}

RULES: dict[str, NDArray[np.int16]] = {
    "COCO-Stuff-171": _coco(),
    "ADE-150": _rule(ILLEGAL, {0: IGNORE} | {raw: raw - 1 for raw in range(1, 151)}),
    "PAS-20": _rule(IGNORE, _OBJECTS),
    "PAS-20b": _rule(IGNORE, {0: 20} | _OBJECTS),
}
