"""What a run folder tells about its run: configuration, machine, code, and the course of the losses."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import errseg
from errseg.data.labels import replacing, save_json
from errseg.errors import ErrSegError
from errseg.train.settings import TrainConfig

CONFIG, ENVIRONMENT, LOG = "config.yaml", "environment.json", "log.jsonl"
_PACKAGES = ("torch", "torchvision", "accelerate", "open_clip_torch", "timm", "numpy", "Pillow", "safetensors")


def record_start(folder: Path, config: TrainConfig, *, step: int, processes: int, device: str) -> None:
    """Write the configuration in full, and add this start to those that the folder lists."""
    import yaml

    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    path = folder / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
    git, patch = git_state(Path(errseg.__file__).parent)
    starts.append(
        {
            "step": step,
            "command": sys.argv,
            "processes": processes,
            "device": device,
            "python": platform.python_version(),
            "system": platform.platform(),
            "versions": {"errseg": errseg.__version__} | {name: _version(name) for name in _PACKAGES},
            "git": git,
        }
    )
    save_json({"starts": starts}, path)
    if patch:
        with replacing(folder / f"uncommitted-{step:08d}.patch") as temporary:
            temporary.write_text(patch, encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Commit, branch and changed files of the checkout around `folder` (None outside one), and its changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout

    try:
        commit, branch = git("rev-parse", "HEAD").strip(), git("rev-parse", "--abbrev-ref", "HEAD").strip()
        changed = git("status", "--porcelain").splitlines()
        return {"commit": commit, "branch": branch, "changed": changed}, git("diff", "HEAD") if changed else ""
    except (OSError, subprocess.CalledProcessError):
        return None, ""


class Log:
    """One JSON object a line in log.jsonl; going on from a step forgets the lines of later ones."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG

    def rewind(self, step: int) -> None:
        """Keep whole lines up to `step`."""
        kept = [entry for entry in self.read() if entry["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def read(self) -> list[dict[str, Any]]:
        """All entries; a last line that an interruption cut is passed over."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry.

        Raises:
            ErrSegError: it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise ErrSegError(f"cannot write {self.path}: {error.strerror or error}") from error


class Window:
    """The losses between two lines of the log, added up on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total, self.steps, self.since = torch.zeros((), device=device), 0, time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self.total += loss
        self.steps += 1

    def seconds(self) -> float:
        return time.perf_counter() - self.since


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from training into the same folder; the lock ends with the process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ErrSegError(f"{folder}: another training writes there; choose another folder with --out") from error
        yield


def move_aside(folder: Path) -> Path:
    """Rename the folder of an earlier run to NAME.1, NAME.2, ...; its new name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)
