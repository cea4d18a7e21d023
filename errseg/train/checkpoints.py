"""Checkpoints as folders that appear when they are complete, and the last few of them kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from errseg.data.labels import save_json
from errseg.errors import ErrSegError

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The folder of a run's checkpoints, step-00002500 and so on, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self.all()), None)

    def clear_remains(self) -> None:
        """Delete what an interruption while writing or deleting left."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path)

    def begin(self, step: int) -> Path:
        """A fresh folder to write the checkpoint into; `finish` makes it count."""
        temporary = self.temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def finish(self, step: int, state: dict[str, Any]) -> Path:
        """Give the complete folder its name, once all of it is on the disk; then delete the oldest."""
        temporary, final = self.temporary(step), self.folder / f"step-{step:08d}"
        save_json(state, temporary / STATE)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if final.exists():  # of the same step, from before: it is replaced
            self._delete(final)
        os.replace(temporary, final)
        _flush(self.folder)
        for path in self.all()[: -self.keep]:
            self._delete(path)
        return final

    def abandon(self, step: int) -> None:
        """Delete what `begin` began."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return self.folder / f".step-{step:08d}.tmp"

    def _delete(self, path: Path) -> None:
        """Out of sight first, so that a half-deleted checkpoint never counts as one."""
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; ErrSegError when it is damaged."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        assert isinstance(state["step"], int) and isinstance(state["sequence"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise damaged(checkpoint, error) from error
    return state


def damaged(checkpoint: Path, error: BaseException) -> ErrSegError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ErrSegError(f"{checkpoint}: damaged checkpoint ({reason:.200}); delete it to go on from the one before")


@contextmanager
def naming_the_last(checkpoints: Checkpoints, step: int) -> Iterator[None]:
    """Turn a failure to write into one line that says what is safe; what was begun is deleted."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ErrSegError) as error:
        # PyTorch's writer and safetensors say in other words, and RuntimeErrors, that a disk is full.
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in ("writ", "unexpected pos")):
            raise
        with suppress(OSError):
            checkpoints.abandon(step)
        last = checkpoints.latest()
        safe = f"{last} is safe, the same command goes on from there" if last else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ErrSegError(f"cannot write checkpoint {step} to {checkpoints.folder}: {reason:.300}; {safe}") from error


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
