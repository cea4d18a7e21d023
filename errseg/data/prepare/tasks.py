"""One label map at a time: a task knows its files, whether they are there already, and how to write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from errseg.data.datasets.benchmarks import BENCHMARKS
from errseg.data.datasets.index_maps import check_range, label_values, read_index_map
from errseg.data.labels import save_image
from errseg.data.prepare.rules import IGNORE, ILLEGAL, RULES
from errseg.errors import ErrSegError


@dataclass(frozen=True)
class Task:
    """A label map `target` to be made from the original `source`."""

    benchmark: str
    source: Path
    target: Path

    def convert(self) -> NDArray[Any] | None:
        """The label map [H, W] in the benchmark's type, None where it is left out; ErrSegError names the file."""
        raise NotImplementedError

    def done(self) -> bool:
        """Whether the target is there, whole, and holds nothing but legal values."""
        return is_good(self.target, self.benchmark)

    def run(self) -> bool:
        """Write the target, whole or not at all; False where it is left out."""
        labels = self.convert()
        if labels is not None:
            save_image(Image.fromarray(labels), self.target)
        return labels is not None


@dataclass(frozen=True)
class LookupTask(Task):
    """An 8-bit map whose values are looked up in the set's rule."""

    leave_out_empty: bool = False  # no file where every pixel is ignored

    def convert(self) -> NDArray[Any] | None:
        raw = read_index_map(self.source)
        if raw.dtype != np.uint8:
            raise ErrSegError(f"{self.source}: expected 8-bit labels, got {raw.dtype}")
        rule = RULES[self.benchmark]
        values = label_values(raw)
        illegal = values[rule[values] == ILLEGAL]
        if len(illegal):
            raise ErrSegError(f"{self.source}: raw label {illegal[0]} is out of range for {self.benchmark}")
        if self.leave_out_empty and (rule[values] == IGNORE).all():
            return None
        return rule.astype(np.uint8)[raw]


def is_good(path: Path, benchmark: str) -> bool:
    """Whether a prepared label map can be read and holds only classes and ignored pixels, in the right type."""
    if not path.is_file():
        return False
    found = BENCHMARKS[benchmark]
    try:
        labels = read_index_map(path)
        check_range(label_values(labels), found.num_classes, found.ignore, path)
    except ErrSegError:
        return False
    return labels.dtype == np.dtype(found.kind)


def require(path: Path, benchmark: str) -> Path:
    """The path, or ErrSegError saying where to get what is missing there."""
    if not path.exists():
        wanted = [source for source in BENCHMARKS[benchmark].sources if path.as_posix().endswith(source.path)]
        advice = f": get {wanted[0].where}" if wanted else ""
        raise ErrSegError(f"{path}: missing for {benchmark}{advice}")
    return path


def read_lines(path: Path, benchmark: str) -> list[str]:
    """The first word of every line of a list of file names."""
    try:
        lines = require(path, benchmark).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ErrSegError(f"{path}: cannot read the list of names ({error})") from error
    names = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        check_name(name, path)
    if not names:
        raise ErrSegError(f"{path}: the list of names is empty")
    return names


def check_name(name: Any, listed_in: Path) -> str:
    """A plain file name; ErrSegError for anything that would lead out of its folder."""
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise ErrSegError(f"{listed_in}: holds {name!r:.80}, which is not a plain file name")
    return name
