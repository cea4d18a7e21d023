"""What `verify` finds in complete, incomplete and damaged sets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errseg.data.datasets import BENCHMARKS, Benchmark
from errseg.data.prepare import prepare
from errseg.data.prepare.checking import verify, verify_folder
from tests.data import layouts
from tests.data.layouts import BUILDERS


def small(name: str, count: int) -> Benchmark:
    """The benchmark with as many labels expected as the small folder has."""
    benchmark = BENCHMARKS[name]
    splits = {key: replace(split, counts=(count,)) for key, split in benchmark.splits.items()}
    return replace(benchmark, splits=splits)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_prepared_set_is_complete(name: str, tmp_path: Path) -> None:
    expected = BUILDERS[name](tmp_path)
    prepare(name, tmp_path, workers=1)
    verdict = verify(small(name, len(expected) + (name == "PAS-20")), tmp_path, workers=1)
    assert verdict.problems == [] and verdict.complete
    assert (verdict.labels, verdict.pairs) == (len(expected), len(expected))
    counts: dict[int, int] = {}
    for labels in expected.values():
        for value in np.unique(labels).tolist():
            counts[value] = counts.get(value, 0) + 1
    assert verdict.values == counts


def test_folders_prepared_elsewhere_need_no_originals(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    prepare("ADE-150", tmp_path, workers=1)
    raw = tmp_path / "ADEChallengeData2016/annotations/validation"
    for path in raw.iterdir():
        path.unlink()
    raw.rmdir()
    assert verify(small("ADE-150", 2), tmp_path, workers=1).complete
    verdict = verify("ADE-150", tmp_path, workers=1)
    assert verdict.problems == ["2 labels in ADEChallengeData2016/annotations_detectron2/validation, expected 2,000"]
    (line,) = verdict.missing_sources
    assert line.startswith(f"{raw}: get ADEChallengeData2016.zip, see http")


@pytest.mark.parametrize(("name", "complete"), [("PAS-20", True), ("PAS-20b", False)])
def test_what_is_left_out_by_rule_needs_no_originals(name: str, complete: bool, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    prepare(name, tmp_path, workers=1)
    base = tmp_path / "VOCdevkit/VOC2012"
    labels = tmp_path / BENCHMARKS[name].split("val").labels
    for i in range(40):
        for folder, suffix in ((base / "JPEGImages", ".jpg"), (labels, ".png")):
            shutil.copy(folder / f"2007_000033{suffix}", folder / f"more{i}{suffix}")
    (base / "ImageSets/Segmentation/val.txt").unlink()
    there = len(list(labels.iterdir()))
    verdict = verify(small(name, there + 1), tmp_path, workers=1)
    line = f"{there} labels in {BENCHMARKS[name].split('val').labels}, expected {there + 1}"
    rule = " less those left out by rule (every pixel is ignored)"
    assert verdict.complete == complete
    assert (verdict.notes[0], verdict.problems) == (line + rule, []) if complete else verdict.problems == [line]
    # A folder that lacks more, or has more, than the rule explains.
    for count in (2 * there, there - 1):
        assert not verify(small(name, count), tmp_path, workers=1).complete


def test_what_is_not_prepared_is_named(tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    prepare("PAS-20", tmp_path, workers=1)
    lost = tmp_path / "VOCdevkit/VOC2012/annotations_detectron2/val/2007_000061.png"
    lost.unlink()
    verdict = verify(small("PAS-20", 3), tmp_path, workers=1)
    assert verdict.problems == [f"1 labels are not prepared yet, the first: {lost}"]
    assert verdict.notes == ["1 labels are left out by rule: every pixel is ignored"]
    assert verdict.missing_sources == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    prepare("ADE-150", tmp_path, workers=1)
    base = tmp_path / "ADEChallengeData2016"
    first = base / "annotations_detectron2/validation/ADE_val_00000001.png"
    Image.fromarray(np.array([[0, 150, 255]], np.uint8)).save(first)
    picture = base / "images/validation/ADE_val_00000002.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])
    verdict = verify(small("ADE-150", 2), tmp_path, workers=2)
    assert verdict.problems[0] == f"{first}: label 150 is out of range (classes 0 to 149, ignored 255)"
    assert str(picture) in verdict.problems[1] and "damaged" in verdict.problems[1]
    assert len(verdict.problems) == 2
    assert verdict.values[150] == 1


def test_sizes_kinds_and_lone_labels(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    prepare("ADE-150", tmp_path, workers=1)
    base = tmp_path / "ADEChallengeData2016"
    labels = base / "annotations_detectron2/validation"
    layouts.photo(base / "images/validation/ADE_val_00000001.jpg", 5, 4)
    Image.fromarray(np.zeros((10, 15), np.uint16)).save(labels / "ADE_val_00000002.png")
    layouts.grey(labels / "ADE_val_00000009.png", [[0]])
    problems = verify(small("ADE-150", 3), tmp_path, workers=1).problems
    lone, size, kind = problems
    assert lone == f"1 labels without a picture, the first: no {base / 'images/validation/ADE_val_00000009.jpg'}"
    assert size.endswith("ADE_val_00000001.png: 2 x 3 pixels, its picture ADE_val_00000001.jpg is 5 x 4")
    assert kind.endswith("ADE_val_00000002.png: expected pixels of uint8, got uint16")


def test_an_empty_root_says_where_to_get_everything(tmp_path: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        verdict = verify(name, tmp_path, workers=1)
        assert not verdict.complete and verdict.labels == 0
        own = [source for source in benchmark.sources if "train2017" not in source.path]
        assert len(verdict.missing_sources) == len(own)
        assert all(": get " in line for line in verdict.missing_sources)


def test_own_folder(tmp_path: Path) -> None:
    layouts.photo(tmp_path / "images/photo.jpg", 1, 3)
    layouts.grey(tmp_path / "labels/photo.png", [[0, 1, 255]])
    layouts.text(tmp_path / "classes.txt", "cat", "sofa")
    verdict = verify_folder(tmp_path, workers=1)
    assert verdict.complete and verdict.values == {0: 1, 1: 1, 255: 1} and verdict.ignore == (255,)
    layouts.text(tmp_path / "classes.txt", "cat")
    (line,) = verify_folder(tmp_path, workers=1).problems
    assert line == f"{tmp_path / 'labels/photo.png'}: label 1 is out of range (classes 0 to 0, ignored 255)"
