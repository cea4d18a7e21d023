"""Label maps as files: exact round trips, the right format for the vocabulary, never half a file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errseg.data.labels import areas, load_labels, save_image, save_json, save_labels
from errseg.errors import ErrSegError


@pytest.mark.parametrize(
    ("num_words", "suffix", "mode", "unknown"),
    [
        (1, ".png", "P", 255),
        (255, ".png", "P", 255),
        (256, ".png", "I;16", 65_535),
        (65_535, ".png", "I;16", 65_535),
        (65_536, ".tif", "I", 2**31 - 1),
        (1_000_000, ".tif", "I", 2**31 - 1),
    ],
)
def test_round_trip(num_words: int, suffix: str, mode: str, unknown: int, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(-1, num_words, (7, 11)).astype(np.int32)
    labels[0, :2] = (-1, num_words - 1)
    path = save_labels(labels, tmp_path / "a.b.png", num_words)
    assert path == tmp_path / f"a.b{suffix}"
    assert np.array_equal(load_labels(path), labels)
    with Image.open(path) as image:
        assert image.mode == mode
        assert np.asarray(image)[0, :2].tolist() == [unknown, num_words - 1]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_palette_has_the_colours(tmp_path: Path) -> None:
    path = save_labels(np.array([[0, 1, -1]]), tmp_path / "a.png", 2, np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    with Image.open(path) as image:
        assert np.asarray(image.convert("RGB")).tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]


def test_areas() -> None:
    assert areas(np.array([[2, 2, 2, -1], [0, 0, -1, -1]]), ["a", "b", "c"]) == [
        {"id": 2, "word": "c", "pixels": 3, "fraction": 0.375},
        {"id": 0, "word": "a", "pixels": 2, "fraction": 0.25},
        {"id": -1, "word": None, "pixels": 3, "fraction": 0.375},
    ]


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.npy"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match="png"):
        save_labels(np.zeros((2, 2), np.int32), tmp_path / name, 3)


def test_not_a_label_map(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ErrSegError, match="not a label map"):
        load_labels(tmp_path / "a.png")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"what was here before")

    def save(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    expected = ErrSegError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save_image(Image.new("RGB", (2, 2)), target)
    if expected is ErrSegError:
        assert str(caught.value) == f"cannot write {target}: No space left on device"
    assert target.read_bytes() == b"what was here before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ErrSegError, match="cannot write"):
        save_json({}, tmp_path / "out" / "a.json")


def test_json_is_readable(tmp_path: Path) -> None:
    facts = {"word": "théière", "image": "caf\udce9.jpg"}
    save_json(facts, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == facts
