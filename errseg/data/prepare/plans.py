"""What there is to do for each set: a plan lists its tasks from the original files below the root."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errseg.data.datasets.benchmarks import Benchmark, Split
from errseg.data.datasets.labelled import list_files
from errseg.data.prepare.tasks import LookupTask, Task, read_lines, require
from errseg.errors import ErrSegError


@dataclass
class Plan:
    """Tasks of a split, folders to make even if they stay empty, and what is passed over, a line each."""

    tasks: Sequence[Task]
    folders: tuple[Path, ...] = ()
    passed_over: list[str] = field(default_factory=list)


Planner = Callable[[Benchmark, Split, Path], Plan]


def plan(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    """The tasks that make the labels of a split.

    Raises:
        ErrSegError: an original file or folder is missing (with where to get it) or damaged.
    """
    return _PLANNERS[benchmark.name](benchmark, split, root)


def _folder(benchmark: Benchmark, split: Split, root: Path, raw: str) -> Plan:
    """Every PNG of a folder becomes one of the same name."""
    folder = require(root / raw, benchmark.name)
    files = list_files(folder, [".png"])
    if not files:
        raise ErrSegError(f"{folder}: no .png labels there")
    target = root / split.labels
    return Plan([LookupTask(benchmark.name, path, target / path.name) for path in files.values()])


def _coco(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    return _folder(benchmark, split, root, split.labels.replace("annotations_detectron2", "annotations"))


def _ade150(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    return _folder(benchmark, split, root, "ADEChallengeData2016/annotations/validation")


def _ade847(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    from errseg.data.prepare.ade847 import ade847_tasks

    base = root / "ADE20K_2021_17_01"
    folders = tuple(
        base / kind / part
        for kind in ("images_detectron2", "annotations_detectron2")
        for part in ("training", "validation")
    )
    return Plan(ade847_tasks(benchmark, split, root), folders)


def _voc(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    base = root / "VOCdevkit/VOC2012"
    names = read_lines(base / "ImageSets/Segmentation/val.txt", benchmark.name)
    raw = require(base / "SegmentationClassAug", benchmark.name)
    target = root / split.labels
    tasks = [
        LookupTask(benchmark.name, raw / f"{name}.png", target / f"{name}.png", leave_out_empty=split.leaves_out_empty)
        for name in names
    ]
    return Plan(tasks)


def _context59(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    from errseg.data.prepare.context import context59_tasks

    return Plan(context59_tasks(benchmark, split, root))


def _context459(benchmark: Benchmark, split: Split, root: Path) -> Plan:
    from errseg.data.prepare.context import Context459Task, check_names_file

    base = root / "VOCdevkit/VOC2010"
    names = read_lines(base / "pascalcontext_val.txt", benchmark.name)
    raw = require(base / "trainval", benchmark.name)
    check_names_file(base / "labels.txt")
    there = list_files(raw, [".mat"])
    missing = [f"{raw / name}.mat: no such file, {name} is left out" for name in names if name not in there]
    if len(missing) == len(names):
        raise ErrSegError(f"{raw}: holds none of the {len(names)} .mat files of pascalcontext_val.txt")
    target = root / split.labels
    tasks = [Context459Task(benchmark.name, there[name], target / f"{name}.tif") for name in names if name in there]
    return Plan(tasks, passed_over=missing)


_PLANNERS: dict[str, Planner] = {
    "COCO-Stuff-171": _coco,
    "ADE-150": _ade150,
    "ADE-847": _ade847,
    "PAS-20": _voc,
    "PAS-20b": _voc,
    "PC-59": _context59,
    "PC-459": _context459,
}
