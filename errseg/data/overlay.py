"""Label maps drawn over pictures: colours, outlines and names."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

PALETTE_SIZE = 1024  # colours further apart than this many cannot be told apart anyway
_GRID_CELLS = 65_536  # names are placed on a coarse grid of about this many cells
_SMALLEST_NAMED = 5e-4  # of the picture: smaller regions are coloured but not named


def palette(n: int) -> UInt8Array:
    """Return n colours [n, 3] uint8, each as far as can be from those before; they repeat after 1,024."""
    return np.resize(_distinct_colors(), (n, 3))


def word_colors(words: Sequence[str]) -> UInt8Array:
    """Return one colour per word, [T, 3] uint8: the word's own (hashed) slot of the palette.

    Up to 1,024 words a slot already taken by an earlier word gives way to the next free one, so that different
    words get different colours; equal words share theirs. With more words each has its slot whatever the others.
    """
    if len(words) > PALETTE_SIZE:
        return _hashed_colors(words)
    slots = 32
    while slots < min(2 * len(words), PALETTE_SIZE):
        slots *= 2
    colors = palette(slots)
    slot_of: dict[str, int] = {}
    taken: set[int] = set()
    for word in words:
        if word in slot_of:
            continue
        slot = zlib.crc32(word.encode()) % slots
        while slot in taken:
            slot = (slot + 1) % slots
        taken.add(slot)
        slot_of[word] = slot
    return colors[[slot_of[word] for word in words]]


def _hashed_colors(words: Sequence[str]) -> UInt8Array:
    return palette(PALETTE_SIZE)[[zlib.crc32(word.encode()) % PALETTE_SIZE for word in words]].reshape(-1, 3)


def draw_overlay(
    image: Image.Image,
    labels: Any,
    names: Sequence[str],
    *,
    alpha: float = 0.5,
    outlines: bool = True,
    text: bool = True,
    font_size: int | None = None,
    colors: npt.ArrayLike | None = None,
) -> Image.Image:
    """Draw a label map over its picture: class colours, region outlines, and each name on its largest region.

    Args:
        image: the picture, any PIL mode.
        labels: [H, W] integers (array or tensor) at the picture's size, index into names; negative = unknown,
            left uncoloured.
        names: one name per label.
        alpha: opacity of the colours, 0 to 1.
        outlines: draw the borders between regions.
        text: write the names; regions under 0.05 % of the picture go without.
        font_size: height of the names in pixels; by default it follows the picture's size.
        colors: [len(names), 3] uint8; by default `word_colors(names)`.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: the label map has another size than the picture, or a label beyond the names.
    """
    picture = image.convert("RGB")
    label_map = np.asarray(labels)
    if label_map.shape != (picture.height, picture.width) or not np.issubdtype(label_map.dtype, np.integer):
        raise ValueError(
            f"expected labels [{picture.height}, {picture.width}] of integers, "
            f"got {list(label_map.shape)} {label_map.dtype}"
        )
    if label_map.size and int(label_map.max()) >= len(names):
        raise ValueError(f"expected labels below {len(names)} (the number of names), got {int(label_map.max())}")
    # Only the classes on the picture matter from here on: 0 = unknown, i = the i-th present class.
    present, compact = _compact(label_map)
    if colors is not None:
        own_colors = np.asarray(colors, dtype=np.uint8)[present]
    elif len(names) > PALETTE_SIZE:  # no word's colour depends on the others
        own_colors = _hashed_colors([names[i] for i in present])
    else:
        own_colors = word_colors(names)[present]
    table = np.concatenate([np.zeros((1, 3), np.uint8), own_colors])

    known = compact > 0
    painted = Image.blend(picture, Image.fromarray(table[compact]), alpha)
    result = Image.composite(painted, picture, Image.fromarray(known))
    if outlines:
        edge = _outline(compact, width=max(1, round(min(picture.size) / 400)))
        result.paste(Image.fromarray(_shade(table)[compact]), mask=Image.fromarray(edge & known))
    if text and present.size:
        _write_names(result, compact, [names[i] for i in present], table[1:], font_size)
    return result


def _compact(label_map: npt.NDArray[Any]) -> tuple[IntArray, npt.NDArray[np.uint16] | IntArray]:
    """Return the sorted labels that occur and the map renumbered by them from 1 (0 = unknown)."""
    largest = int(label_map.max(initial=-1))
    occurs = np.zeros(largest + 2, bool)
    occurs[np.maximum(label_map, -1) + 1] = True
    present = np.flatnonzero(occurs[1:])
    renumber = np.zeros(largest + 2, np.uint16 if present.size < 65_535 else np.int64)
    renumber[present + 1] = np.arange(1, present.size + 1)
    return present, renumber[np.maximum(label_map, -1) + 1]


@lru_cache(maxsize=1)
def _distinct_colors() -> UInt8Array:
    """Farthest-point sampling in Oklab of the sRGB colours that are neither too dark, too pale nor grey."""
    levels = np.linspace(0, 255, 18).round()
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(lattice)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.93) & (chroma > 0.1)
    lattice, lab = lattice[vivid], lab[vivid]
    lab = lab * (0.6, 1.0, 1.0)  # hue before lightness: shading in the photograph already varies lightness
    chosen = [int(np.argmin(((lattice - (230, 60, 50)) ** 2).sum(1)))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < PALETTE_SIZE:
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return lattice[chosen].astype(np.uint8)


def _oklab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB 0..255 [N, 3] -> Oklab (Ottosson 2020), where Euclidean distance is about what people see."""
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cone = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(cone) @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip


def _shade(colors: UInt8Array) -> UInt8Array:
    """Darken colours for outlines."""
    return (colors * 0.62).astype(np.uint8)


def _is_light(color: Sequence[int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def _outline(labels: npt.NDArray[Any], width: int) -> npt.NDArray[np.bool_]:
    """Mask of the pixels within `width` of another region."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= differs
        edge[tuple(after)] |= differs
    for _ in range(width - 1):
        grown = edge.copy()
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        edge = grown
    return edge


def _components(labels: npt.NDArray[Any]) -> IntArray:
    """Number the 4-connected regions of equal labels, [h, w]: union by minimum with pointer jumping."""
    index = np.arange(labels.size).reshape(labels.shape)
    rows, columns = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    first = np.concatenate([index[:-1][rows], index[:, :-1][columns]])
    second = np.concatenate([index[1:][rows], index[:, 1:][columns]])
    root = index.ravel().copy()
    while True:
        a, b = root[first], root[second]
        open_edges = a != b
        if not open_edges.any():
            return root.reshape(labels.shape)
        first, second, a, b = first[open_edges], second[open_edges], a[open_edges], b[open_edges]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, root[root]):
            root = root[root]


def _depth(components: IntArray) -> npt.NDArray[np.int32]:
    """Chessboard distance of each cell to the border of its region (the picture's border counts as one)."""
    depth = np.zeros(components.shape, np.int32)
    padded = np.pad(components, 1, constant_values=-1)
    height, width = components.shape
    alive = np.ones_like(components, bool)
    for dy in range(3):
        for dx in range(3):
            alive &= padded[dy : dy + height, dx : dx + width] == components
    while alive.any():
        depth += alive
        ring = np.pad(alive, 1)
        rows = ring[:-2] & ring[1:-1] & ring[2:]
        alive = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return depth


def _window_sums(mask: npt.NDArray[Any], height: int, width: int) -> IntArray:
    """Sum of the mask over every height x width window, indexed by its top left cell."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(mask, 0, dtype=np.int64), 1, out=total[1:, 1:])
    return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]


class _Placer:
    """Finds room for name boxes on a coarse grid over the label map, largest region first."""

    def __init__(self, labels: npt.NDArray[Any]) -> None:
        self.stride = max(1, round((labels.size / _GRID_CELLS) ** 0.5))
        offset = self.stride // 2 if min(labels.shape) > self.stride // 2 else 0
        self.labels = labels[offset :: self.stride, offset :: self.stride]
        self.components = _components(self.labels)
        self.depth = _depth(self.components)
        self.taken = np.zeros(self.labels.shape, bool)
        cells = np.bincount(self.components.ravel(), minlength=self.labels.size)
        roots = np.flatnonzero(cells >= max(1.0, _SMALLEST_NAMED * self.labels.size))
        self.region: dict[int, int] = {}  # class -> root of its largest region, largest first
        for root in roots[np.argsort(-cells[roots], kind="stable")]:
            label = int(self.labels.flat[root])
            if label > 0:
                self.region.setdefault(label, int(root))

    def pole(self, label: int) -> tuple[int, int]:
        """Pixel (x, y) of the innermost point of the class's largest region."""
        inside = np.where(self.components == self.region[label], self.depth, -1)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        return int((x + 0.5) * self.stride), int((y + 0.5) * self.stride)

    def inside(self, label: int, width: int, height: int, crowd: bool = False) -> tuple[int, int] | None:
        """Top left pixel of a box centred in the class's region, on free ground unless crowd; else None."""
        box_h, box_w = self._cells(width, height)
        if box_h > self.labels.shape[0] or box_w > self.labels.shape[1]:
            return None
        own = self.components == self.region[label]
        cover = _window_sums(own, box_h, box_w) / (box_h * box_w)
        centre = (
            slice(box_h // 2, box_h // 2 + cover.shape[0]),
            slice(box_w // 2, box_w // 2 + cover.shape[1]),
        )
        score = cover + 0.5 * self.depth[centre] / (1 + self.depth[own].max())
        overlap = _window_sums(self.taken, box_h, box_w)
        allowed = own[centre] if crowd else own[centre] & (overlap == 0)
        if not allowed.any():
            return None
        score = np.where(allowed, score - 4 * overlap / (box_h * box_w), -np.inf)
        return self._take(score, box_h, box_w)

    def beside(self, label: int, width: int, height: int) -> tuple[int, int] | None:
        """Top left pixel of the free box nearest to the class's region, within a few box widths of it."""
        box_h, box_w = self._cells(width, height)
        if box_h > self.labels.shape[0] or box_w > self.labels.shape[1]:
            return None
        x, y = self.pole(label)
        overlap = _window_sums(self.taken, box_h, box_w)
        rows, columns = np.ogrid[: overlap.shape[0], : overlap.shape[1]]
        away = np.hypot(rows + box_h / 2 - y / self.stride, (columns + box_w / 2 - x / self.stride) / 2)
        score = np.where((overlap == 0) & (away < 5 * box_h), -away, -np.inf)
        return self._take(score, box_h, box_w) if np.isfinite(score).any() else None

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def _take(self, score: npt.NDArray[np.float64], box_h: int, box_w: int) -> tuple[int, int]:
        top, left = np.unravel_index(int(score.argmax()), score.shape)
        self.taken[top : top + box_h, left : left + box_w] = True
        return int(left) * self.stride, int(top) * self.stride


def _write_names(
    picture: Image.Image,
    compact: npt.NDArray[Any],
    names: Sequence[str],
    colors: UInt8Array,
    font_size: int | None,
) -> None:
    """Write each name in a rounded box of its colour; crowded names shrink, then move aside with a line."""
    size = font_size or int(np.clip(min(picture.size) / 26, 10, 72))
    sizes = (
        [size] if font_size else sorted({size, max(9, round(0.75 * size)), max(8, round(0.55 * size))}, reverse=True)
    )
    placer = _Placer(compact)
    draw = ImageDraw.Draw(picture)
    for label in placer.region:
        name, color = names[label - 1], tuple(int(c) for c in colors[label - 1])
        for height in sizes:
            box = _NameBox(name, height, picture.width)
            corner = placer.inside(label, box.width, box.height)
            if corner is not None:
                break
        else:
            corner = placer.beside(label, box.width, box.height)
            if corner is not None:
                middle = (corner[0] + box.width // 2, corner[1] + box.height // 2)
                draw.line([placer.pole(label), middle], fill=color, width=max(1, box.pad // 2))
            else:
                corner = placer.inside(label, box.width, box.height, crowd=True) or (0, 0)
        box.draw(draw, corner, color)


class _NameBox:
    """A name set in a font, cut with an ellipsis to the picture's width."""

    def __init__(self, name: str, font_size: int, room: int) -> None:
        self.font = ImageFont.load_default(font_size)
        self.pad = max(1, round(font_size / 5))
        self.text = " ".join(name.split())
        while len(self.text) > 1 and self.font.getlength(self.text) + 4 * self.pad > room:
            self.text = self.text.rstrip("…")[:-1] + "…"
        ascent, descent = self.font.getmetrics()  # type: ignore[union-attr]
        self.width = int(self.font.getlength(self.text)) + 4 * self.pad
        self.height = ascent + descent + self.pad

    def draw(self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], color: tuple[int, ...]) -> None:
        left, top = corner
        ink = (0, 0, 0) if _is_light(color) else (255, 255, 255)
        draw.rounded_rectangle(
            (left, top, left + self.width - 1, top + self.height - 1),
            radius=self.height // 4,
            fill=color,
            outline=ink,
            width=1 if self.height > 16 else 0,
        )
        middle = (left + self.width / 2, top + self.height / 2)
        draw.text(middle, self.text, font=self.font, fill=ink, anchor="mm")
