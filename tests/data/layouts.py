"""Small folders in the original layout of each benchmark, with the labels that must come out of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Labels = dict[str, NDArray[Any]]  # expected label maps by path below the root

# Raw category of PASCAL in Detail -> class of PC-59, as published.
_CONTEXT_59 = """
2:0 9:1 18:2 19:3 22:4 23:5 25:6 31:7 33:8 34:9 44:10 45:11 46:12 59:13 65:14 68:15 72:16 80:17 85:18 98:19 104:20
105:21 113:22 115:23 144:24 158:25 159:26 162:27 187:28 189:29 207:30 220:31 232:32 258:33 259:34 260:35 284:36 295:37
296:38 308:39 324:40 326:41 347:42 349:43 354:44 355:45 360:46 366:47 368:48 397:49 415:50 416:51 420:52 424:53 427:54
440:55 445:56 454:57 458:58
"""
CONTEXT_59 = {int(raw): int(index) for raw, index in (pair.split(":") for pair in _CONTEXT_59.split())}
COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def photo(path: Path, height: int, width: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


def grey(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def palette(path: Path, values: Any) -> None:
    """An index PNG with a palette, as PASCAL VOC has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8), "L")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert image.mode == "P"
    image.save(path)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def coco(root: Path, part: str = "val") -> Labels:
    used = [raw for raw in range(182) if raw not in COCO_UNUSED]
    every = np.array([*range(182), 255, 255], np.uint8).reshape(8, 23)
    expected = np.array([used.index(v) if v in used else 255 for v in every.ravel()], np.uint8).reshape(8, 23)
    base = root / "coco-stuff"
    photo(base / f"images/{part}2017/000000000139.jpg", 8, 23)
    grey(base / f"annotations/{part}2017/000000000139.png", every)
    return {f"coco-stuff/annotations_detectron2/{part}2017/000000000139.png": expected}


def ade150(root: Path) -> Labels:
    base = root / "ADEChallengeData2016"
    labels = {}
    for i, raw in enumerate(([[0, 1, 2], [149, 150, 0]], np.arange(150).reshape(10, 15))):
        raw = np.asarray(raw)
        name = f"ADE_val_0000000{i + 1}"
        photo(base / f"images/validation/{name}.jpg", *raw.shape)
        grey(base / f"annotations/validation/{name}.png", raw)
        target = f"ADEChallengeData2016/annotations_detectron2/validation/{name}.png"
        labels[target] = np.where(raw == 0, 255, raw - 1).astype(np.uint8)
    return labels


def voc(root: Path, background: bool = False) -> Labels:
    base = root / "VOCdevkit/VOC2012"
    first = np.array([[0, 1, 2, 3], [19, 20, 255, 21]])  # 21 occurs in no original
    empty = np.array([[0, 0], [0, 255]])
    text(base / "ImageSets/Segmentation/val.txt", "2007_000033", "2007_000042", "2007_000061")
    for name, raw, save in (
        ("2007_000033", first, grey),
        ("2007_000042", empty, palette),
        ("2007_000061", first[:, ::-1], palette),
        ("2007_000999", first, grey),  # not in the list
    ):
        photo(base / f"JPEGImages/{name}.jpg", *raw.shape)
        save(base / f"SegmentationClassAug/{name}.png", raw)
    if background:
        wanted = np.array([[20, 0, 1, 2], [18, 19, 255, 255]], np.uint8)
        others = {"2007_000042": np.array([[20, 20], [20, 255]], np.uint8)}
    else:
        wanted = np.array([[255, 0, 1, 2], [18, 19, 255, 255]], np.uint8)
        others = {}
    folder = f"VOCdevkit/VOC2012/annotations_detectron2{'_bg' if background else ''}/val"
    labels = {"2007_000033": wanted, "2007_000061": wanted[:, ::-1], **others}
    return {f"{folder}/{name}.png": values for name, values in labels.items()}


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed run lengths of a mask, column by column, beginning with zeros."""
    counts, current, length = [], False, 0
    for value in mask.ravel(order="F").tolist():
        if value != current:
            counts.append(length)
            current, length = value, 0
        length += 1
    return {"size": list(mask.shape), "counts": [*counts, length]}


def compressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The run lengths as the original JSON has them."""
    from pycocotools import mask as masks

    runs = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def context59(root: Path) -> Labels:
    base = root / "VOCdevkit/VOC2010"
    height, width = 6, 80
    rows, columns = np.indices((height, width))
    segments, expected = [], np.full((height, width), 255, np.uint8)
    # One column for each of the 59 and a few that are none of them, the last rows overwritten later.
    for column, raw in enumerate([*CONTEXT_59, 1, 3, 459, 431]):
        segments.append((raw, compressed((columns == column) & (rows > 0))))
        expected[1:, column] = CONTEXT_59.get(raw, 255)
    segments.append((2, compressed(rows == 5)))  # aeroplane on top of them all,
    segments.append((1, run_lengths((rows == 5) & (columns < 3))))  # then something else on top of that
    expected[5] = 0
    expected[5, :3] = 255
    images = [
        {"image_id": 2008000002, "file_name": "2008_000002.jpg", "phase": "val", "height": height, "width": width},
        {"image_id": 2008000003, "file_name": "2008_000003.jpg", "phase": "train", "height": 2, "width": 2},
        {"image_id": 2008000007, "file_name": "2008_000007.jpg", "phase": "val", "height": 2, "width": 3},
    ]
    entries = [{"image_id": 2008000002, "category_id": raw, "segmentation": runs} for raw, runs in segments]
    whole = np.ones((2, 3), bool)
    entries.insert(3, {"image_id": 2008000003, "category_id": 2, "segmentation": compressed(whole[:, :2])})
    entries.insert(5, {"image_id": 2008000007, "category_id": 458, "segmentation": compressed(whole)})
    text(base / "trainval_merged.json", json.dumps({"images": images, "annos_segmentation": entries}))
    for entry in images:
        photo(base / "JPEGImages" / str(entry["file_name"]), int(str(entry["height"])), int(str(entry["width"])))
    folder = "VOCdevkit/VOC2010/annotations_detectron2/pc59_val"
    return {
        f"{folder}/2008_000002.png": expected,
        f"{folder}/2008_000007.png": np.full((2, 3), 58, np.uint8),
    }


def matlab(path: Path, values: Any, kind: type = np.uint16) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"LabelMap": np.asarray(values, kind), "other": np.zeros(3)})


def context459(root: Path) -> Labels:
    base = root / "VOCdevkit/VOC2010"
    raw = np.arange(1, 460).reshape(17, 27)
    text(base / "pascalcontext_val.txt", "2008_000002", "2008_000007")
    text(base / "labels.txt", *(f"{i}: name{i}" for i in range(1, 460)))
    matlab(base / "trainval/2008_000002.mat", raw)
    matlab(base / "trainval/2008_000007.mat", raw[::-1])
    matlab(base / "trainval/2008_000003.mat", raw)  # not in the list
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        photo(base / f"JPEGImages/{name}.jpg", 17, 27)
    folder = "VOCdevkit/VOC2010/annotations_detectron2/pc459_val"
    return {
        f"{folder}/2008_000002.tif": (raw - 1).astype(np.uint16),
        f"{folder}/2008_000007.tif": (raw[::-1] - 1).astype(np.uint16),
    }


# Raw ids of ADE-847's first classes, and one that is no class.
ADE_WALL, ADE_BUILDING, ADE_SKY, NO_CLASS = 2978, 312, 2420, 3001
ADE_FOLDER = "ADE20K_2021_17_01/images/ADE/{}/street"


def ade_segmentation(path: Path, ids: NDArray[Any], seed: int = 0) -> None:
    """Red holds ten times the 256s (and up to 9 more), green the ones, blue the instances."""
    generator = np.random.default_rng(seed)
    red = ids // 256 * 10 + generator.integers(0, 6, ids.shape)
    colours = np.stack([red, ids % 256, generator.integers(0, 256, ids.shape)], -1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).save(path)


def ade_index(root: Path, names: list[str], **extra: Any) -> None:
    folders = [ADE_FOLDER.format("validation" if "_val_" in name else "training") for name in names]
    path = root / "ADE20K_2021_17_01/index_ade20k.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    index = {"filename": names, "folder": folders, "objectPresence": np.zeros((2, 3)), "scene": ["street"], **extra}
    path.write_bytes(pickle.dumps(index, protocol=2))


def ade847(root: Path) -> Labels:
    """One small picture, one picture with a short side beyond 512 and an EXIF orientation, one for training."""
    import cv2

    names = ["ADE_train_00000001.jpg", "ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    ade_index(root, names)
    folder = root / ADE_FOLDER.format("validation")
    photo(folder / names[1], 12, 20, seed=1)
    small = np.random.default_rng(1).choice([ADE_WALL, ADE_BUILDING, ADE_SKY, 0, NO_CLASS, 6655], (12, 20))
    ade_segmentation(folder / "ADE_val_00000001_seg.png", small)

    pixels = np.random.default_rng(2).integers(0, 256, (700, 521, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle
    Image.fromarray(pixels).save(folder / names[2], quality=95, exif=exif)
    large = np.random.default_rng(3).choice([ADE_WALL, ADE_BUILDING, ADE_SKY, 0], (700, 521))
    ade_segmentation(folder / "ADE_val_00000002_seg.png", large)
    reduced = cv2.resize(large.astype(np.int32), (512, 688), interpolation=cv2.INTER_NEAREST)  # 688 = round(687.9)

    known = {ADE_WALL: 0, ADE_BUILDING: 1, ADE_SKY: 2}
    target = "ADE20K_2021_17_01/annotations_detectron2/validation"
    return {
        f"{target}/ADE_val_0000000{i}.tif": np.vectorize(lambda v: known.get(int(v), 65535))(ids).astype(np.uint16)
        for i, ids in ((1, small), (2, reduced))
    }


BUILDERS: dict[str, Callable[[Path], Labels]] = {
    "COCO-Stuff-171": coco,
    "ADE-150": ade150,
    "ADE-847": ade847,
    "PAS-20": voc,
    "PAS-20b": lambda root: voc(root, background=True),
    "PC-59": context59,
    "PC-459": context459,
}
