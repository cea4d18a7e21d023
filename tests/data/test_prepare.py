"""Every label rule on a small folder in the original layout, and what happens to bad files."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from errseg.data.classes import class_names
from errseg.data.datasets import BENCHMARKS, index_maps
from errseg.data.prepare import prepare
from errseg.data.prepare.index_pickle import load_index
from errseg.data.prepare.runner import run_tasks
from errseg.errors import ErrSegError
from tests.data import layouts
from tests.data.layouts import BUILDERS


def outputs(root: Path, name: str, split: str = "val") -> dict[str, Path]:
    folder = root / BENCHMARKS[name].split(split).labels
    return {str(path.relative_to(root)): path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", BUILDERS)
def test_labels_are_equal_byte_for_byte(name: str, tmp_path: Path) -> None:
    expected = BUILDERS[name](tmp_path)
    summary, passed_over = prepare(name, tmp_path, workers=1)
    assert (summary.failed, passed_over) == ([], [])
    written = outputs(tmp_path, name)
    assert list(written) == sorted(expected)
    for path, labels in expected.items():
        with Image.open(written[path]) as image:
            stored = np.asarray(image)
            wanted = ("PNG", "L") if path.endswith(".png") else ("TIFF", "I;16")
            assert (image.format, image.mode) == wanted
        assert stored.dtype == labels.dtype and stored.tobytes() == labels.tobytes()
    assert summary.written == len(expected) and summary.left_out == (name == "PAS-20")


def test_the_training_split_of_coco(tmp_path: Path) -> None:
    expected = layouts.coco(tmp_path, "train")
    summary, _ = prepare("coco171", tmp_path, split="train", workers=1)
    assert summary.written == 1
    assert list(outputs(tmp_path, "COCO-Stuff-171", "train")) == list(expected)
    with pytest.raises(ErrSegError, match=r"annotations/val2017: missing.*get stuffthingmaps"):
        prepare("coco171", tmp_path, workers=1)
    with pytest.raises(ErrSegError, match="ADE-150 has no split 'train': choose one of val"):
        prepare("ade150", tmp_path, split="train")


def test_pc59_and_pc459_call_the_same_things_by_the_same_names() -> None:
    small, large = class_names("pc59"), class_names("pc459")
    different = {raw for raw, index in layouts.CONTEXT_59.items() if large[raw - 1] != small[index]}
    assert different == {397} and (small[49], large[396]) == ("diningtable", "table")


def test_pictures_of_ade847_are_saved_anew(tmp_path: Path) -> None:
    import cv2

    layouts.ade847(tmp_path)
    prepare("ADE-847", tmp_path, workers=1)
    base = tmp_path / "ADE20K_2021_17_01"
    for kind in ("images_detectron2", "annotations_detectron2"):
        assert list((base / kind / "training").iterdir()) == []
    source = tmp_path / layouts.ADE_FOLDER.format("validation")
    for name, size in (("ADE_val_00000001.jpg", None), ("ADE_val_00000002.jpg", (512, 688))):
        pixels = np.asarray(Image.open(source / name))
        if size is not None:
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
        Image.fromarray(pixels).save(tmp_path / "expected.jpg")
        written = base / "images_detectron2/validation" / name
        assert written.read_bytes() == (tmp_path / "expected.jpg").read_bytes() != (source / name).read_bytes()
        assert not Image.open(written).getexif()
    assert sorted(os.listdir(base / "images_detectron2/validation")) == ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]


@pytest.mark.parametrize("name", ["ADE-150", "ADE-847"])
def test_a_second_run_writes_only_what_is_missing_or_damaged(name: str, tmp_path: Path) -> None:
    expected = BUILDERS[name](tmp_path)
    prepare(name, tmp_path, workers=1)
    first, second = outputs(tmp_path, name).values()
    content = second.read_bytes()
    os.utime(first, (1, 1))
    second.write_bytes(content[: len(content) // 2])  # as an interrupted copy leaves it
    seen: list[tuple[int, int]] = []
    summary, _ = prepare(name, tmp_path, workers=1, progress=lambda *at: seen.append(at))
    assert (summary.written, summary.kept, seen) == (1, 1, [(1, 2), (2, 2)])
    assert first.stat().st_mtime == 1 and second.read_bytes() == content
    labels = expected[str(second.relative_to(tmp_path))]
    Image.fromarray(np.full_like(labels, 200 if name == "ADE-150" else 847)).save(second)  # no such class
    assert prepare(name, tmp_path, workers=1)[0].written == 1 and second.read_bytes() == content
    assert prepare(name, tmp_path, workers=1, overwrite=True)[0].written == 2
    assert first.stat().st_mtime > 1


def test_ade847_picture_lost_or_damaged_is_made_again(tmp_path: Path) -> None:
    layouts.ade847(tmp_path)
    prepare("ADE-847", tmp_path, workers=1)
    picture = tmp_path / "ADE20K_2021_17_01/images_detectron2/validation/ADE_val_00000001.jpg"
    content = picture.read_bytes()
    picture.write_bytes(content[:300])
    assert prepare("ADE-847", tmp_path, workers=1)[0].written == 1
    assert picture.read_bytes() == content


def test_threads_share_the_work_and_report_failures(tmp_path: Path) -> None:
    expected = layouts.ade150(tmp_path)
    raw = tmp_path / "ADEChallengeData2016/annotations/validation"
    (raw / "ADE_val_00000003.png").write_bytes(b"not a picture")
    summary, _ = prepare("ADE-150", tmp_path, workers=3)
    assert summary.written == 2 and list(outputs(tmp_path, "ADE-150")) == list(expected)
    (line,) = summary.failed
    assert line.startswith(f"{raw / 'ADE_val_00000003.png'}: ") and "\n" not in line


def bad_ade150(root: Path) -> Path:
    layouts.ade150(root)
    return root / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"


def test_no_workers() -> None:
    with pytest.raises(ErrSegError, match="workers: expected at least 1, got 0"):
        run_tasks([], workers=0)


def test_damaged_source_is_named(tmp_path: Path) -> None:
    path = bad_ade150(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    summary, _ = prepare("ADE-150", tmp_path, workers=1)
    assert summary.written == 1 and len(summary.failed) == 1
    assert str(path) in summary.failed[0] and "damaged" in summary.failed[0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((2, 2), 151, np.uint8), "raw label 151 is out of range for ADE-150"),
        (np.full((2, 2), 1, np.uint16), "expected 8-bit labels, got uint16"),
        (np.zeros((2, 2, 3), np.uint8), "not a map of class indices"),
    ],
)
def test_wrong_values_are_named(values: Any, reason: str, tmp_path: Path) -> None:
    path = bad_ade150(tmp_path)
    Image.fromarray(values).save(path)
    (line,) = prepare("ADE-150", tmp_path, workers=1)[0].failed
    assert line.startswith(f"{path}: ") and reason in line
    assert not (tmp_path / "ADEChallengeData2016/annotations_detectron2/validation" / path.name).exists()


def test_raw_label_beyond_coco_is_named(tmp_path: Path) -> None:
    layouts.coco(tmp_path)
    path = tmp_path / "coco-stuff/annotations/val2017/000000000139.png"
    layouts.grey(path, [[182]])
    (line,) = prepare("COCO-Stuff-171", tmp_path, workers=1)[0].failed
    assert line == f"{path}: raw label 182 is out of range for COCO-Stuff-171"


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug/2007_000033.png"
    path.unlink()
    summary, _ = prepare("PAS-20", tmp_path, workers=1)
    assert summary.failed == [f"{path}: no such file"] and summary.written == 1


@pytest.mark.parametrize(("name", "left_out"), [("PAS-20", 2), ("PAS-20b", 0)])
def test_only_pas20_leaves_out_what_is_ignored_altogether(name: str, left_out: int, tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug/2007_000061.png"
    layouts.grey(path, np.full((2, 4), 255))
    summary, _ = prepare(name, tmp_path, workers=1)
    assert (summary.written, summary.left_out, summary.failed) == (3 - left_out, left_out, [])
    if not left_out:
        with Image.open(outputs(tmp_path, name)[f"{BENCHMARKS[name].split('val').labels}/{path.name}"]) as image:
            assert (np.asarray(image) == 255).all()


def test_ade847_looks_once_at_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.ade847(tmp_path)
    prepare("ADE-847", tmp_path, workers=1)
    read: list[str] = []
    opened = index_maps.open_pixels

    def spy(path: Path) -> Any:
        read.append(path.name)
        return opened(path)

    monkeypatch.setattr("errseg.data.datasets.index_maps.open_pixels", spy)
    monkeypatch.setattr("errseg.data.prepare.ade847.open_pixels", spy)
    assert prepare("ADE-847", tmp_path, workers=1)[0].kept == 2
    assert sorted(read) == [f"ADE_val_0000000{i}.{kind}" for i in (1, 2) for kind in ("jpg", "tif")]
    target = tmp_path / "ADE20K_2021_17_01/annotations_detectron2/validation/ADE_val_00000001.tif"
    Image.fromarray(np.zeros((3, 4), np.uint16)).save(target)  # of another size than its picture
    assert prepare("ADE-847", tmp_path, workers=1)[0].written == 1


def test_a_full_disk_stops_and_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.ade150(tmp_path)

    def save(self: Image.Image, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ErrSegError) as caught:
        patch.setattr(Image.Image, "save", save)
        prepare("ADE-150", tmp_path, workers=1)
    target = tmp_path / "ADEChallengeData2016/annotations_detectron2/validation"
    assert str(caught.value) == (
        f"cannot write {target / 'ADE_val_00000001.png'}: No space left on device; "
        "stopped after 0 of 2, run it again to go on"
    )
    assert list(target.iterdir()) == []
    assert prepare("ADE-150", tmp_path, workers=1)[0].written == 2


@pytest.mark.parametrize("value", [0, 460])
def test_pc459_checks_before_it_subtracts(value: int, tmp_path: Path) -> None:
    layouts.context459(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/trainval/2008_000002.mat"
    layouts.matlab(path, [[1, value]])
    (line,) = prepare("PC-459", tmp_path, workers=1)[0].failed
    assert line == f"{path}: raw label {value} is out of range for PC-459 (1 to 459)"


def test_pc459_files_that_are_no_label_maps(tmp_path: Path) -> None:
    layouts.context459(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2010/trainval"
    layouts.matlab(base / "2008_000002.mat", [[1.5]], float)
    (base / "2008_000007.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    first, second = prepare("PC-459", tmp_path, workers=1)[0].failed
    layouts.matlab(base / "2008_000002.mat", [[1, 2]], np.uint8)  # read as 16 bit ever after
    (narrow, _) = prepare("PC-459", tmp_path, workers=1)[0].failed
    assert narrow == f"{base / '2008_000002.mat'}: expected LabelMap [H, W] of uint16, got uint8 [1, 2]"
    assert "expected LabelMap [H, W] of uint16, got float64 [1, 1]" in first
    assert f"{base / '2008_000007.mat'}: unreadable MATLAB file" in second


def test_pc459_without_a_mat_file_is_passed_over_aloud(tmp_path: Path) -> None:
    layouts.context459(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/trainval/2008_000007.mat"
    path.unlink()
    summary, passed_over = prepare("PC-459", tmp_path, workers=1)
    assert (summary.written, summary.failed) == (1, [])
    assert passed_over == [f"{path}: no such file, 2008_000007 is left out"]


def test_pc459_wrong_class_count(tmp_path: Path) -> None:
    layouts.context459(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/labels.txt"
    path.write_text("".join(f"{i}: name\n" for i in range(1, 459)))
    with pytest.raises(ErrSegError) as caught:
        prepare("PC-459", tmp_path, workers=1)
    assert str(caught.value) == f"{path}: lists 458 classes, expected the numbers 1 to 459"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "damaged"),
        ('{"images": []}', "no entry 'annos_segmentation'"),
        ('{"images": [], "annos_segmentation": []}', "no picture of the phase val"),
    ],
)
def test_pc59_json_that_is_none(content: str, reason: str, tmp_path: Path) -> None:
    layouts.context59(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/trainval_merged.json"
    path.write_text(content)
    with pytest.raises(ErrSegError) as caught:
        prepare("PC-59", tmp_path, workers=1)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


def test_pc59_segment_of_another_size_names_the_picture(tmp_path: Path) -> None:
    layouts.context59(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/trainval_merged.json"
    path.write_text(path.read_text().replace('"height": 2, "width": 3', '"height": 3, "width": 2'))
    (line,) = prepare("PC-59", tmp_path, workers=1)[0].failed
    assert line == f"{path}: 2008_000007.jpg is 3 x 2 pixels, a segment of it 2 x 3"


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("must-not-exist",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"filename": _Evil()}), "it asks for posix.mkdir"),
        (pickle.dumps(Path("x")), "it asks for pathlib"),
        (b"cnumpy\nndarray\n((K\x01tR.", "refused or damaged"),  # an array called into being by itself
        (pickle.dumps({"filename": ["ADE_val_1.jpg"]})[:-9], "refused or damaged"),
        (b"", "refused or damaged"),
    ],
)
def test_the_index_may_hold_plain_values_and_arrays_only(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layouts.ade847(tmp_path)
    path = tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl"
    path.write_bytes(content)
    with pytest.raises(ErrSegError) as caught:
        prepare("ADE-847", tmp_path, workers=1)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
    assert not Path("must-not-exist").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_index_holds_arrays_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    table = np.arange(6.0).reshape(2, 3)
    index = {"a": table, "f": np.asfortranarray(table), "names": np.array(["x", "yz"], object), "n": np.float32(2)}
    path = tmp_path / "index.pkl"
    path.write_bytes(pickle.dumps(index, protocol))
    found = load_index(path)
    assert np.array_equal(found["a"], table) and np.array_equal(found["f"], table)
    assert found["names"].tolist() == ["x", "yz"] and found["n"] == 2


@pytest.mark.parametrize("name", ["../ADE_val_1.jpg", "a/ADE_val_1.jpg", "", 7])
def test_the_index_cannot_lead_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"filename": [name], "folder": ["ADE20K_2021_17_01/images"]}))
    with pytest.raises(ErrSegError, match="not a plain file name"):
        prepare("ADE-847", tmp_path, workers=1)
    path.write_bytes(pickle.dumps({"filename": ["ADE_val_1.jpg"], "folder": ["../elsewhere"]}))
    with pytest.raises(ErrSegError, match="not below the root"):
        prepare("ADE-847", tmp_path, workers=1)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("ADE-847", "cv2", "opencv-python-headless"),
        ("PC-59", "pycocotools.mask", "pycocotools"),
        ("PC-459", "scipy.io", "scipy"),
    ],
)
def test_a_missing_package_is_one_line(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BUILDERS[name](tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ErrSegError) as caught:
        _, failed = (found := prepare(name, tmp_path, workers=1)), found[0].failed
        raise ErrSegError(failed[0])
    assert f"{name} needs the package {package}" in str(caught.value)
    assert "pip install 'errseg[data]'" in str(caught.value)
