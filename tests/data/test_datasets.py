"""Names, roots, class tables, pairs, and one's own folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errseg.data.classes import TABLES, class_names, class_table
from errseg.data.datasets import BENCHMARKS, datasets_root, find_benchmark, open_benchmark, open_folder
from errseg.data.prepare import prepare
from errseg.data.prepare.plans import _PLANNERS
from errseg.errors import ErrSegError
from tests.data import layouts


def test_class_tables() -> None:
    sizes = {name: len(class_table(name)) for name in TABLES}
    assert sizes == {"coco171": 171, "ade150": 150, "ade847": 847, "voc20": 20, "voc20b": 59, "pc59": 59, "pc459": 459}
    assert class_names("voc20b")[:20] == class_names("voc20")
    assert sorted(class_names("voc20b")) == sorted(class_names("pc59"))
    assert class_names("pc459")[430] == "unknown" and class_names("pc59")[::58] == ("aeroplane", "wood")
    assert class_table("ade847")[1] == ("building, edifice", 312)
    assert len({row.raw_id for row in class_table("ade847")}) == 847
    assert all(row.raw_id is None for row in class_table("ade150"))
    # Two classes of ADE-847 may share their first synonym: 19 do, in 9 groups.
    first = [name.split(", ")[0] for name in class_names("ade847")]
    shared = [name for name in first if first.count(name) > 1]
    assert (len(shared), len(set(shared))) == (19, 9)


def test_benchmarks_and_their_classes() -> None:
    assert _PLANNERS.keys() == BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and len(benchmark.classes) == benchmark.num_classes
        if name != "PAS-20b":
            assert benchmark.words == benchmark.classes
            assert benchmark.class_of_word == tuple(range(benchmark.num_classes))
    background = BENCHMARKS["PAS-20b"]
    assert (len(background.words), background.classes[19:]) == (59, ("tvmonitor", "background"))
    assert background.class_of_word == (*range(20), *[20] * 39)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ADE-150", "ADE-150"),
        ("ade150", "ADE-150"),
        ("pas20b", "PAS-20b"),
        ("voc20b", "PAS-20b"),
        ("coco171", "COCO-Stuff-171"),
        ("ade20k_full_sem_seg_freq_val_all", "ADE-847"),
    ],
)
def test_sets_are_found_however_they_are_spelled(name: str, found: str) -> None:
    assert find_benchmark(name).name == found


def test_an_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(ErrSegError, match=r"no set 'cityscapes': choose one of COCO-Stuff-171, .*PC-459"):
        find_benchmark("cityscapes")


def test_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRSEG_DATASETS", raising=False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert datasets_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "theirs")
    assert datasets_root() == Path("theirs")
    monkeypatch.setenv("ERRSEG_DATASETS", "ours")
    assert datasets_root() == Path("ours") and datasets_root("given") == Path("given")


def test_pairs_are_the_common_stems(tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    prepare("PAS-20", tmp_path, workers=1)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/notes.txt").write_text("")
    (tmp_path / "VOCdevkit/VOC2012/annotations_detectron2/val/.2007_000033.png.1.tmp").write_text("half-written")
    found = open_benchmark("PAS-20", tmp_path)  # four pictures, two labels
    assert [pair.stem for pair in found.pairs] == ["2007_000033", "2007_000061"]
    assert found.pairs[0].image.suffix == ".jpg"
    assert found.labels(found.pairs[0]).tolist() == [[-1, 0, 1, 2], [18, 19, -1, -1]]


def test_an_unprepared_set_says_what_to_run(tmp_path: Path) -> None:
    layouts.voc(tmp_path)
    with pytest.raises(ErrSegError, match=rf"annotations_detectron2/val: run `errseg data verify PAS-20 {tmp_path}`"):
        open_benchmark("PAS-20", tmp_path)


def test_ignored_values_differ(tmp_path: Path) -> None:
    layouts.ade847(tmp_path)
    layouts.context459(tmp_path)
    for name in ("ADE-847", "PC-459"):
        prepare(name, tmp_path, workers=1)
    first = open_benchmark("ADE-847", tmp_path)
    assert {-1, 0, 1, 2} == set(np.unique(first.labels(first.pairs[0])).tolist())
    second = open_benchmark("PC-459", tmp_path)
    assert second.labels(second.pairs[0]).max() == 458
    path = second.pairs[0].label
    Image.fromarray(np.array([[458, 459]], np.uint16)).save(path)
    assert second.labels(second.pairs[0]).tolist() == [[458, -1]]
    Image.fromarray(np.array([[460, 65535]], np.uint16)).save(path)
    with pytest.raises(ErrSegError, match="label 460 is out of range \\(classes 0 to 458, ignored 459\\)"):
        second.labels(second.pairs[0])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for i, suffix in enumerate((".jpg", ".png")):
        layouts.photo(tmp_path / f"images/photo{i}{suffix}", 2, 3, seed=i)
    layouts.palette(tmp_path / "labels/photo0.png", [[0, 1, 2], [255, 255, 0]])
    Image.fromarray(np.array([[0, 1, 2], [65535, 1, 0]], np.uint16)).save(tmp_path / "labels/photo1.png")
    layouts.text(tmp_path / "classes.txt", "cat, tomcat", "sofa", "", "wall")
    return tmp_path


def test_own_folder(own: Path) -> None:
    found = open_folder(own)
    assert found.classes == found.words == ("cat, tomcat", "sofa", "wall")
    assert [found.labels(pair).tolist() for pair in found.pairs] == [
        [[0, 1, 2], [-1, -1, 0]],
        [[0, 1, 2], [-1, 1, 0]],
    ]


def test_own_folder_with_more_labels_than_classes(own: Path) -> None:
    layouts.text(own / "classes.txt", "cat", "sofa")
    found = open_folder(own)
    with pytest.raises(ErrSegError) as caught:
        found.labels(found.pairs[0])
    path = own / "labels/photo0.png"
    assert str(caught.value) == f"{path}: label 2 is out of range (classes 0 to 1, ignored 255)"


@pytest.mark.parametrize("lost", ["images/photo0.jpg", "labels/photo0.png", "classes.txt"])
def test_own_folder_lacks_something(lost: str, own: Path) -> None:
    (own / lost).unlink()
    partner = {"images/photo0.jpg": "labels/photo0.png: has no image", "labels/photo0.png": "photo0.jpg: has no label"}
    with pytest.raises(ErrSegError, match=partner.get(lost, r"classes\.txt: cannot read")):
        open_folder(own)


def test_two_pictures_of_one_stem_are_named(own: Path) -> None:
    layouts.photo(own / "images/photo0.png", 2, 3)
    with pytest.raises(ErrSegError) as caught:
        open_folder(own)
    first, second = own / "images/photo0.jpg", own / "images/photo0.png"
    assert str(caught.value) == f"{first} and {second} have one name but for the suffix: rename or remove one"


def test_no_own_folder(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
    layouts.text(tmp_path / "classes.txt", "cat")
    with pytest.raises(ErrSegError, match=r"images: no files there; own data is images/, labels/ and classes\.txt"):
        open_folder(tmp_path)
