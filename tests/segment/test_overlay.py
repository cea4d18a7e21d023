"""Overlays: colours, outlines, and names where they belong."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from errseg.data import overlay
from errseg.data.overlay import draw_overlay, palette, word_colors


def blocks(height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Label map of rows x columns rectangles."""
    y, x = np.mgrid[:height, :width]
    return (y * rows // height * columns + x * columns // width).astype(np.int32)


def test_palette_colours_are_apart() -> None:
    colors = palette(64)
    assert colors.shape == (64, 3) and colors.dtype == np.uint8
    assert np.array_equal(palette(8), colors[:8])
    lab = overlay._oklab(colors.astype(float))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(64)
    assert distances.min() > 0.06  # 0.02 is a just noticeable difference
    assert len(palette(3000)) == 3000 and np.array_equal(palette(3000)[1024:2048], palette(1024))


def test_colours_belong_to_words() -> None:
    words = ["cat", "sofa", "cat", "wall"]
    colors = word_colors(words)
    assert np.array_equal(colors[0], colors[2])
    assert len({tuple(c) for c in colors.tolist()}) == 3
    assert np.array_equal(word_colors([f"w{i}" for i in range(500)]), word_colors([f"w{i}" for i in range(500)]))
    assert len({tuple(c) for c in word_colors([f"w{i}" for i in range(1024)]).tolist()}) == 1024


def test_unknown_pixels_stay_as_they_are() -> None:
    image = Image.new("RGB", (60, 40), (10, 20, 30))
    labels = np.full((40, 60), -1)
    assert np.array_equal(np.asarray(draw_overlay(image, labels, ["a"])), np.asarray(image))
    labels[:, :30] = 0
    drawn = np.asarray(draw_overlay(image, labels, ["a"], text=False))
    assert (drawn[:, 30:] == (10, 20, 30)).all()
    assert (drawn[:, :29] != (10, 20, 30)).any(-1).all()


def test_colours_are_blended_by_alpha() -> None:
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    labels = torch.zeros(8, 8, dtype=torch.int32)
    drawn = draw_overlay(image, labels, ["a"], alpha=0.25, text=False, colors=[[200, 0, 100]])
    assert drawn.getpixel((4, 4)) == (125, 75, 100)
    assert draw_overlay(image, labels, ["a"], alpha=0, text=False).getpixel((0, 0)) == (100, 100, 100)


def test_outlines_follow_the_border() -> None:
    image = Image.new("RGB", (40, 40))
    labels = blocks(40, 40, 1, 2)
    with_lines = np.asarray(draw_overlay(image, labels, ["a", "b"], text=False))
    without = np.asarray(draw_overlay(image, labels, ["a", "b"], text=False, outlines=False))
    changed = (with_lines != without).any(-1)
    assert changed[:, 19:21].all() and not changed[:, :19].any() and not changed[:, 21:].any()


@pytest.mark.parametrize(("width", "height"), [(100, 100), (640, 427), (3840, 2160), (4000, 400)])
def test_names_do_not_overlap_and_lie_in_their_regions(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[str, int, int, int, int]] = []

    def record(self: overlay._NameBox, draw: object, corner: tuple[int, int], color: object) -> None:
        boxes.append((self.text, corner[0], corner[1], corner[0] + self.width, corner[1] + self.height))

    monkeypatch.setattr(overlay._NameBox, "draw", record)
    labels = blocks(height, width, 3, 2)
    names = ["cat", "sofa", "wall", "tree", "road", "cup"]
    draw_overlay(Image.new("RGB", (width, height)), labels, names)
    assert sorted(box[0] for box in boxes) == sorted(names)
    for text, left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= width + 1 and bottom <= height + 1
        assert labels[(top + bottom) // 2, (left + right) // 2] == names.index(text)
    for i, (_, left, top, right, bottom) in enumerate(boxes):
        for _, left2, top2, right2, bottom2 in boxes[:i]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (17, 13)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    labels = np.zeros(size[::-1], np.int32)
    assert draw_overlay(Image.new("RGB", size), labels, ["a rather long name"]).size == size


def test_many_words_on_noise_take_no_time() -> None:
    labels = np.random.default_rng(0).integers(-1, 60, (480, 640))
    start = time.perf_counter()
    draw_overlay(Image.new("RGB", (640, 480)), labels, [f"word {i}" for i in range(60)])
    assert time.perf_counter() - start < 10


def test_a_large_vocabulary() -> None:
    names = [f"w{i}" for i in range(100_000)]
    drawn = draw_overlay(Image.new("RGB", (64, 64)), np.full((64, 64), 99_999), names, text=False)
    assert drawn.getpixel((30, 30)) == tuple(c // 2 for c in word_colors(names)[99_999])


@pytest.mark.parametrize("labels", [np.zeros((3, 4), np.int32), np.zeros((4, 4)), np.full((4, 4), 2)])
def test_wrong_label_maps(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected labels"):
        draw_overlay(Image.new("RGB", (4, 4)), labels, ["a", "b"])


def test_components_and_depth() -> None:
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    components = overlay._components(spiral)
    assert len(np.unique(components[spiral == 1])) == 1
    assert len(np.unique(components[spiral == 0])) == 1
    assert len(np.unique(overlay._components(np.indices((6, 6)).sum(0) % 2))) == 36
    assert overlay._depth(np.zeros((5, 7), np.int64)).tolist()[2] == [0, 1, 2, 2, 2, 1, 0]
