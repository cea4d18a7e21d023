"""Result files: JSON lines, one row per measurement and one machine card per run, appended as they come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errseg.bench.cases import Case
from errseg.errors import ErrSegError

ROWS, CARDS = "rows.jsonl", "machines.jsonl"
OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"


@dataclass(frozen=True)
class Row:
    """One provider at one size in one precision and pass.

    Times in milliseconds, memory in bytes on top of arguments and parameters; None where nothing was measured.
    `speedup_*` is the median over rounds of the other's time divided by this one's, with its quartiles behind it.
    """

    run: str  # the machine card
    target: str
    case: dict[str, Any]
    label: str  # of the case
    provider: str
    passing: str
    precision: str
    tf32: bool
    device: str  # "cpu" or "cuda"
    status: str
    reason: str | None = None
    backends: dict[str, str] = field(default_factory=dict)  # per op
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int = 0
    speedup_published: float | None = None
    speedup_reference: float | None = None
    speedup_quartiles: tuple[float, float] | None = None  # of the first that is there
    peak_bytes: int | None = None
    peak_by: str | None = None  # "cuda allocator", "storages" or "process"
    matmul_flops: int = 0
    vector_flops: int = 0
    bytes: int = 0
    floor_ms: float | None = None
    roofline_share: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row measures; two runs are compared row by row."""
        return (self.target, self.label, self.provider, self.passing, self.precision, self.tf32, self.device)

    @property
    def name(self) -> str:
        """The key for people."""
        tf32 = " tf32" if self.tf32 else ""
        return f"{self.target} [{self.label}] {self.provider} {self.passing} {self.precision}{tf32} on {self.device}"

    @property
    def size(self) -> Case:
        """The case."""
        return Case.from_dict(self.case)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Inverse of `to_json`; raises ErrSegError for anything else."""
        try:
            values = json.loads(line)
            quartiles = values.get("speedup_quartiles")
            return cls(**{**values, "speedup_quartiles": tuple(quartiles) if quartiles else None})
        except (ValueError, TypeError, AttributeError) as error:
            raise ErrSegError(f"not a row of errseg bench: {line.strip()[:80]!r} ({error})") from error


def append_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Add rows to a results folder; what is there stays."""
    _append(folder / ROWS, [row.to_json() for row in rows])


def append_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Add the machine card of a run."""
    _append(folder / CARDS, [json.dumps(card)])


def _append(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def read_rows(folder: Path) -> list[Row]:
    """The rows of a results folder, the last one of each key; raises ErrSegError when there are none."""
    path = folder / ROWS
    if not path.is_file():
        raise ErrSegError(f"{folder} has no {ROWS}: give a folder that errseg bench wrote")
    rows = [Row.from_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise ErrSegError(f"{path} is empty")
    return list({row.key: row for row in rows}.values())


def read_cards(folder: Path) -> dict[str, dict[str, Any]]:
    """Machine cards by run."""
    path = folder / CARDS
    if not path.is_file():
        raise ErrSegError(f"{folder} has no {CARDS}: give a folder that errseg bench wrote")
    try:
        cards = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {card["run"]: card for card in cards}
    except (ValueError, KeyError, TypeError) as error:
        raise ErrSegError(f"{path} is damaged: {error}") from error
