"""The benchmarks: where their files are, what their labels mean, and where to get them.

ERR-Seg, SED and CAT-Seg share these layouts, so folders prepared for any of them work as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from errseg.data.classes import class_names
from errseg.errors import ErrSegError

ROOT_VARIABLES = ("ERRSEG_DATASETS", "DETECTRON2_DATASETS")


@dataclass(frozen=True)
class Split:
    """Folders of one part of a benchmark below the root of all sets, and how many labels it has."""

    registered: str  # the name under which the published code bases know it
    images: str
    labels: str
    label_suffix: str
    counts: tuple[int, ...]  # any of these is complete
    image_suffix: str = ".jpg"
    leaves_out_empty: bool = False  # label maps with nothing but ignored pixels, which then do not count either


@dataclass(frozen=True)
class Source:
    """A file or folder of the original set, below the root, and where to get it."""

    path: str
    where: str


@dataclass(frozen=True)
class Benchmark:
    """A labelled set: `words` are offered to the model, `classes` are scored.

    The two differ for PAS-20b only, where the words from 20 on all count as the class "background".
    """

    name: str
    table: str  # of the words
    num_classes: int
    ignore: int
    splits: Mapping[str, Split]
    sources: tuple[Source, ...]
    kind: str = "uint8"  # pixels of the prepared labels

    @property
    def words(self) -> tuple[str, ...]:
        return class_names(self.table)

    @property
    def classes(self) -> tuple[str, ...]:
        if len(self.words) == self.num_classes:
            return self.words
        return (*self.words[: self.num_classes - 1], "background")

    @property
    def class_of_word(self) -> tuple[int, ...]:
        """The class that each word counts as."""
        return tuple(min(i, self.num_classes - 1) for i in range(len(self.words)))

    def split(self, name: str) -> Split:
        """The split of that name; ErrSegError if there is none."""
        if name not in self.splits:
            raise ErrSegError(f"{self.name} has no split {name!r}: choose one of {', '.join(self.splits)}")
        return self.splits[name]


_COCO_IMAGES = "http://images.cocodataset.org/zips/{}2017.zip (page: https://cocodataset.org)"
_COCO_LABELS = "stuffthingmaps_trainval2017.zip, see https://github.com/nightrome/cocostuff"
_ADE150 = "ADEChallengeData2016.zip, see http://sceneparsing.csail.mit.edu"
_ADE847 = "the full ADE20K 2021_17_01, by the form at https://groups.csail.mit.edu/vision/datasets/ADE20K/request_data/"
_VOC2012 = "VOCtrainval_11-May-2012.tar, see http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
_VOC_AUG = "SegmentationClassAug.zip, see https://github.com/kazuto1011/deeplab-pytorch (data/datasets/voc12/README.md)"
_VOC2010 = "VOCtrainval_03-May-2010.tar, see http://host.robots.ox.ac.uk/pascal/VOC/voc2010/"
_DETAIL = "trainval_merged.json of PASCAL in Detail, see https://github.com/zhanghang1989/detail-api"
_PC459 = "trainval.tar.gz, see https://roozbehm.info/pascal-context/"
_PC459_LIST = "pascalcontext_val.txt, in the folder datasets of https://github.com/cvlab-kaist/CAT-Seg"

_ADE_FULL = "ADE20K_2021_17_01"
_VOC = "VOCdevkit/VOC2012"
_CONTEXT = "VOCdevkit/VOC2010"


def _coco(part: str, registered: str, count: int) -> Split:
    folders = (f"coco-stuff/images/{part}2017", f"coco-stuff/annotations_detectron2/{part}2017")
    return Split(registered, *folders, ".png", (count,))


def _voc_sources() -> tuple[Source, ...]:
    return (
        Source(f"{_VOC}/JPEGImages", _VOC2012),
        Source(f"{_VOC}/ImageSets/Segmentation/val.txt", _VOC2012),
        Source(f"{_VOC}/SegmentationClassAug", _VOC_AUG),
    )


_ALL = (
    Benchmark(
        "COCO-Stuff-171",
        "coco171",
        171,
        255,
        {
            "train": _coco("train", "coco_2017_train_stuff_all_sem_seg", 118_287),
            "val": _coco("val", "coco_2017_test_stuff_all_sem_seg", 5000),
        },
        tuple(Source(f"coco-stuff/images/{part}2017", _COCO_IMAGES.format(part)) for part in ("train", "val"))
        + tuple(Source(f"coco-stuff/annotations/{part}2017", _COCO_LABELS) for part in ("train", "val")),
    ),
    Benchmark(
        "ADE-150",
        "ade150",
        150,
        255,
        {
            "val": Split(
                "ade20k_150_test_sem_seg",
                "ADEChallengeData2016/images/validation",
                "ADEChallengeData2016/annotations_detectron2/validation",
                ".png",
                (2000,),
            )
        },
        (
            Source("ADEChallengeData2016/images/validation", _ADE150),
            Source("ADEChallengeData2016/annotations/validation", _ADE150),
        ),
    ),
    Benchmark(
        "ADE-847",
        "ade847",
        847,
        65_535,
        {
            "val": Split(
                "ade20k_full_sem_seg_freq_val_all",
                f"{_ADE_FULL}/images_detectron2/validation",
                f"{_ADE_FULL}/annotations_detectron2/validation",
                ".tif",
                (2000,),
            )
        },
        (Source(f"{_ADE_FULL}/index_ade20k.pkl", _ADE847), Source(f"{_ADE_FULL}/images/ADE/validation", _ADE847)),
        kind="uint16",
    ),
    Benchmark(
        "PAS-20",
        "voc20",
        20,
        255,
        {
            "val": Split(
                "voc_2012_test_sem_seg",
                f"{_VOC}/JPEGImages",
                f"{_VOC}/annotations_detectron2/val",
                ".png",
                (1449,),
                leaves_out_empty=True,
            )
        },
        _voc_sources(),
    ),
    Benchmark(
        "PAS-20b",
        "voc20b",
        21,
        255,
        {
            "val": Split(
                "voc_2012_test_background_sem_seg",
                f"{_VOC}/JPEGImages",
                f"{_VOC}/annotations_detectron2_bg/val",
                ".png",
                (1449,),
            )
        },
        _voc_sources(),
    ),
    Benchmark(
        "PC-59",
        "pc59",
        59,
        255,
        {
            "val": Split(
                "context_59_test_sem_seg",
                f"{_CONTEXT}/JPEGImages",
                f"{_CONTEXT}/annotations_detectron2/pc59_val",
                ".png",
                (5104, 5105),
            )
        },
        (Source(f"{_CONTEXT}/JPEGImages", _VOC2010), Source(f"{_CONTEXT}/trainval_merged.json", _DETAIL)),
    ),
    Benchmark(
        "PC-459",
        "pc459",
        459,
        459,
        {
            "val": Split(
                "context_459_test_sem_seg",
                f"{_CONTEXT}/JPEGImages",
                f"{_CONTEXT}/annotations_detectron2/pc459_val",
                ".tif",
                (5104,),
            )
        },
        (
            Source(f"{_CONTEXT}/JPEGImages", _VOC2010),
            Source(f"{_CONTEXT}/pascalcontext_val.txt", _PC459_LIST),
            Source(f"{_CONTEXT}/trainval", _PC459),
        ),
        kind="uint16",
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# Every name somebody may know a set by: its own, its table's, and those that the published code registers.
_KNOWN = {
    _plain(name): benchmark
    for benchmark in _ALL
    for name in (benchmark.name, benchmark.table, *(split.registered for split in benchmark.splits.values()))
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, however it is spelled ("ADE-150", "ade150"); ErrSegError if there is none."""
    found = _KNOWN.get(_plain(name))
    if found is None:
        raise ErrSegError(f"no set {name!r}: choose one of {', '.join(BENCHMARKS)}")
    return found


def datasets_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Where all sets are: `root`, else $ERRSEG_DATASETS, else $DETECTRON2_DATASETS, else ./datasets."""
    for value in (root, *map(os.environ.get, ROOT_VARIABLES)):
        if value:
            return Path(value)
    return Path("datasets")
