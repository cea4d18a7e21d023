"""Evaluated pictures on disk: what each process has counted, so that nothing is done twice and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errseg.data.datasets import Pair
from errseg.data.labels import replacing
from errseg.errors import ErrSegError

_NAME = re.compile(r"run(\d{4})-process(\d{4})\.safetensors")


@dataclass
class Part:
    """A confusion matrix, the pictures that are counted in it, and those that were skipped, with why; by stem.

    `done` holds the `file_digest` of each picture's files as they were counted.
    """

    confusion: NDArray[np.int64]
    done: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, key: str) -> None:
        """Write it whole or not at all; `key` says what was evaluated with what."""
        from safetensors.numpy import save

        # Names as a tensor, because a header has a size limit.
        names = json.dumps({"counted": self.done, "skipped": self.skipped}).encode()
        tensors: dict[str, NDArray[Any]] = {"confusion": self.confusion, "names": np.frombuffer(names, np.uint8)}
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"key": key}))


def load_part(path: Path, key: str) -> Part:
    """What `Part.save` wrote.

    Raises:
        ErrSegError: naming the file, when it is damaged or belongs to another evaluation.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            known = (file.metadata() or {}).get("key")
            names = json.loads(file.get_tensor("names").tobytes())
            part = Part(file.get_tensor("confusion"), names["counted"], names["skipped"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ErrSegError(f"{path}: damaged ({error}); delete it, its pictures are then evaluated again") from error
    if known != key:
        raise ErrSegError(
            f"{path} is of another evaluation (other weights, data or settings): "
            "choose another folder with --out, or begin anew with --restart"
        )
    return part


def part_files(folder: Path) -> list[Path]:
    """The files of parts in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def part_path(folder: Path, run: int, process: int) -> Path:
    return folder / f"run{run:04d}-process{process:04d}.safetensors"


def next_run(folder: Path) -> int:
    """One more than the runs that have left parts: every run writes files of its own."""
    runs = [int(found[1]) for path in part_files(folder) if (found := _NAME.fullmatch(path.name))]
    return max(runs, default=-1) + 1


def joined_parts(parts: Iterable[Part], size: int) -> Part:
    """The sum of parts; ErrSegError if a picture is in two of them."""
    total = Part(np.zeros((size, size), np.int64))
    for part in parts:
        if total.done.keys() & part.done.keys():
            raise ErrSegError("a picture was counted twice: two evaluations share a folder; begin anew with --restart")
        total.confusion += part.confusion
        total.done |= part.done
        total.skipped |= part.skipped
    return total


def file_digest(pair: Pair) -> str:
    """Of a label file, to the byte, and of its picture's size; "" where one cannot be read."""
    try:
        return f"{hashlib.sha256(pair.label.read_bytes()).hexdigest()[:16]}-{pair.image.stat().st_size}"
    except OSError:
        return ""
