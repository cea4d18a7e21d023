"""ADE-847: the full ADE20K by its pickled index, larger pictures made smaller as the published numbers have them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from errseg.data.classes import class_table
from errseg.data.datasets.benchmarks import Benchmark, Split
from errseg.data.datasets.index_maps import open_pixels
from errseg.data.labels import save_image
from errseg.data.prepare.index_pickle import load_index
from errseg.data.prepare.packages import need
from errseg.data.prepare.tasks import Task, check_name, is_good, require
from errseg.errors import ErrSegError

SHORT_SIDE = 512
IGNORE = 65_535
_RAW_IDS = 26 * 256  # red / 10 counts 256s, green counts ones


@cache
def _rule() -> NDArray[np.uint16]:
    rule = np.full(_RAW_IDS, IGNORE, np.uint16)
    for index, row in enumerate(class_table("ade847")):
        assert row.raw_id is not None
        rule[row.raw_id] = index
    return rule


@dataclass(frozen=True)
class Ade847Task(Task):
    """A picture, saved anew as JPEG of Pillow's default quality, and its 16-bit labels.

    Pictures whose short side exceeds 512 get a short side of 512, others keep their size; all are saved anew,
    without EXIF, because the published numbers are on such files.
    """

    photo: Path  # `source` is its segmentation
    photo_target: Path

    def done(self) -> bool:
        if not (self.photo_target.is_file() and is_good(self.target, self.benchmark)):
            return False
        with Image.open(self.target) as labels:  # its header; all of it has been read
            width, height = labels.size
        try:
            return open_pixels(self.photo_target)[0].shape[:2] == (height, width)
        except ErrSegError:
            return False

    def run(self) -> bool:
        photo, _ = open_pixels(self.photo)
        if photo.dtype != np.uint8 or (photo.ndim == 3 and photo.shape[2] != 3):
            raise ErrSegError(f"{self.photo}: expected 8-bit grey or RGB, got {photo.dtype} {list(photo.shape)}")
        ids = self.raw_ids()
        size = reduced_size(*photo.shape[:2])
        if size is not None:
            cv2 = need("cv2", self.benchmark)
            width_height = (size[1], size[0])
            photo = cv2.resize(photo, width_height, interpolation=cv2.INTER_LINEAR)
            ids = cv2.resize(ids, width_height, interpolation=cv2.INTER_NEAREST)
        elif ids.shape != photo.shape[:2]:
            raise ErrSegError(f"{self.source}: {list(ids.shape)} pixels, its picture has {list(photo.shape[:2])}")
        save_image(Image.fromarray(photo), self.photo_target)
        save_image(Image.fromarray(_rule()[ids]), self.target)
        return True

    def raw_ids(self) -> NDArray[np.int32]:
        """Raw ids [H, W] from the colours of the segmentation."""
        colours, _ = open_pixels(self.source)
        if colours.dtype != np.uint8 or colours.ndim != 3 or colours.shape[2] < 3:
            raise ErrSegError(f"{self.source}: expected 8-bit RGB, got {colours.dtype} {list(colours.shape)}")
        return (colours[..., 0] // 10).astype(np.int32) * 256 + colours[..., 1]


def reduced_size(height: int, width: int) -> tuple[int, int] | None:
    """(height, width) with a short side of 512; None where it is no longer than that."""
    if min(height, width) <= SHORT_SIDE:
        return None
    if width >= height:
        return SHORT_SIDE, round(width / float(height) * SHORT_SIDE)
    return round(height / float(width) * SHORT_SIDE), SHORT_SIDE


def ade847_tasks(benchmark: Benchmark, split: Split, root: Path) -> list[Ade847Task]:
    """A task for every validation picture of index_ade20k.pkl."""
    path = require(root / "ADE20K_2021_17_01/index_ade20k.pkl", benchmark.name)
    need("cv2", benchmark.name)
    tasks = []
    for folder, name in _entries(path, load_index(path)):
        parts = check_name(name, path).split("_")
        if len(parts) < 2 or not name.endswith(".jpg"):
            raise ErrSegError(f"{path}: {name!r} is not a picture's name like ADE_val_00000001.jpg")
        if parts[1] == "val":
            photo, stem = root / folder / name, name.removesuffix(".jpg")
            tasks.append(
                Ade847Task(
                    benchmark.name,
                    photo.with_name(f"{stem}_seg.png"),
                    root / split.labels / f"{stem}.tif",
                    photo,
                    root / split.images / name,
                )
            )
    if not tasks:
        raise ErrSegError(f"{path}: lists no validation picture")
    return tasks


def _entries(path: Path, index: Any) -> list[tuple[str, str]]:
    """(folder, file name) pairs of the index."""
    try:
        folders, names = list(index["folder"]), list(index["filename"])
    except (KeyError, TypeError) as error:
        raise ErrSegError(f"{path}: not the index of ADE20K: it has no lists folder and filename") from error
    if len(folders) != len(names):
        raise ErrSegError(f"{path}: {len(folders)} folders for {len(names)} file names")
    for folder in folders:
        if not isinstance(folder, str) or PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise ErrSegError(f"{path}: holds the folder {folder!r:.80}, which is not below the root")
    return list(zip(folders, names, strict=True))
