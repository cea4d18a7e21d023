"""PASCAL-Context: 59 classes from run lengths in a JSON, 459 from MATLAB files."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errseg.data.datasets.benchmarks import Benchmark, Split
from errseg.data.prepare.packages import need
from errseg.data.prepare.rules import CONTEXT_59, CONTEXT_RAW, IGNORE
from errseg.data.prepare.tasks import Task, check_name, require
from errseg.errors import ErrSegError

_RULE_59 = np.full(CONTEXT_RAW + 1, IGNORE, np.uint8)
_RULE_59[list(CONTEXT_59)] = np.arange(len(CONTEXT_59))


@dataclass(frozen=True)
class Context59Task(Task):
    """The segments of one picture, drawn in their order: later ones lie on top."""

    image: str
    size: tuple[int, int]  # height, width
    segments: tuple[tuple[int, Any], ...]  # category, run lengths

    def convert(self) -> NDArray[Any]:
        masks = need("pycocotools.mask", self.benchmark)
        raw = np.zeros(self.size, np.int64)
        for category, runs in self.segments:
            try:
                if isinstance(runs["counts"], list):
                    runs = masks.frPyObjects(runs, *self.size)
                inside = masks.decode(runs)
            except (TypeError, KeyError, ValueError, IndexError) as error:
                raise ErrSegError(f"{self.source}: {self.image}: damaged run lengths ({error})") from error
            if inside.shape != self.size:
                raise ErrSegError(
                    f"{self.source}: {self.image} is {self.size[0]} x {self.size[1]} pixels, "
                    f"a segment of it {inside.shape[0]} x {inside.shape[1]}"
                )
            raw[inside.astype(bool)] = category
        # Only the 59 count; whatever else there is becomes ignored.
        return _RULE_59[np.where((raw >= 0) & (raw <= CONTEXT_RAW), raw, 0)]


def context59_tasks(benchmark: Benchmark, split: Split, root: Path) -> list[Context59Task]:
    """A task for every picture of the phase "val" in trainval_merged.json."""
    path = require(root / "VOCdevkit/VOC2010/trainval_merged.json", benchmark.name)
    need("pycocotools.mask", benchmark.name)
    try:
        facts = json.loads(path.read_bytes())
        images = {entry["image_id"]: entry for entry in facts["images"] if entry["phase"] == "val"}
        segments: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
        for entry in facts["annos_segmentation"]:
            if entry["image_id"] in images:
                segments[entry["image_id"]].append((int(entry["category_id"]), entry["segmentation"]))
        tasks = []
        for key, entry in images.items():
            name = check_name(entry["file_name"], path)
            target = root / split.labels / f"{Path(name).stem}.png"
            size = (int(entry["height"]), int(entry["width"]))
            tasks.append(Context59Task(benchmark.name, path, target, name, size, tuple(segments[key])))
    except OSError as error:
        raise ErrSegError(f"{path}: cannot read it ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ErrSegError(f"{path}: damaged or not the annotations of PASCAL in Detail ({what})") from error
    if not tasks:
        raise ErrSegError(f"{path}: no picture of the phase val")
    return tasks


@dataclass(frozen=True)
class Context459Task(Task):
    """The matrix LabelMap (uint16) of a MATLAB file, less one."""

    def convert(self) -> NDArray[Any]:
        io = need("scipy.io", self.benchmark)
        try:
            found = io.loadmat(self.source, variable_names=["LabelMap"])
        except Exception as error:  # scipy lets many kinds through on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ErrSegError(f"{self.source}: unreadable MATLAB file ({reason})") from error
        raw = found.get("LabelMap")
        if not isinstance(raw, np.ndarray) or raw.ndim != 2 or raw.dtype != np.uint16:
            kind = "nothing" if raw is None else f"{getattr(raw, 'dtype', type(raw))} {list(np.shape(raw))}"
            raise ErrSegError(f"{self.source}: expected LabelMap [H, W] of uint16, got {kind}")
        # Checked before the subtraction, which wraps around in an unsigned type.
        if raw.size == 0 or raw.min() < 1 or raw.max() > CONTEXT_RAW:
            wrong = "no pixel" if raw.size == 0 else f"raw label {raw.min() if raw.min() < 1 else raw.max()}"
            raise ErrSegError(f"{self.source}: {wrong} is out of range for {self.benchmark} (1 to {CONTEXT_RAW})")
        return raw - np.uint16(1)


def check_names_file(path: Path) -> None:
    """Raise ErrSegError if labels.txt ("1: accordion" a line), where it is there, does not list 459 classes."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    listed = {int(index) for index in re.findall(r"^\s*(\d+)\s*:", text, re.MULTILINE)} - {0}
    if listed != set(range(1, CONTEXT_RAW + 1)):
        raise ErrSegError(f"{path}: lists {len(listed)} classes, expected the numbers 1 to {CONTEXT_RAW}")
