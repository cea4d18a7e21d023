"""Two results folders of one machine: what became slower, larger, or is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from errseg.bench.rows import OK, Row, read_cards, read_rows
from errseg.bench.table import number, si
from errseg.errors import ErrSegError

NOISE = 0.03  # relative; less is no regression even where the quartiles are closer
MEMORY_NOISE = 0.05
MEMORY_SLACK = 4 << 20  # bytes


@dataclass(frozen=True)
class Verdict:
    """One row of the old results against the new ones."""

    row: Row
    kind: str  # "same", "faster", "slower", "larger", "missing", "failed"
    text: str

    @property
    def bad(self) -> bool:
        """Whether this fails the comparison."""
        return self.kind in ("slower", "larger", "missing", "failed")


def compare(old: Path, new: Path) -> list[Verdict]:
    """A verdict per measured row of `old`; raises ErrSegError for unlike machines or when there is none.

    On a GPU medians are compared. A CPU's clock is shared with whatever else runs, so there each row is compared by
    its ratio to the first yardstick of its own run (published, else reference).
    """
    _check_machines(old, new)
    before = [row for row in read_rows(old) if row.status == OK]
    if not before:
        raise ErrSegError(f"{old} holds no measured row: there is nothing to compare with")
    after = {row.key: row for row in read_rows(new)}
    return [_verdict(row, after.get(row.key)) for row in before]


def _check_machines(old: Path, new: Path) -> None:
    names = [sorted({card["machine"] for card in read_cards(folder).values()}) for folder in (old, new)]
    if names[0] != names[1] or len(names[0]) != 1:
        described = " and ".join(", ".join(machines) for machines in names)
        raise ErrSegError(f"only results of one machine can be compared, these are of {described}")


def _verdict(old: Row, new: Row | None) -> Verdict:
    if new is None:
        return Verdict(old, "missing", "was measured, is missing now")
    if new.status != OK:
        return Verdict(old, "missing" if new.status == "unavailable" else "failed", f"{new.status}: {new.reason}")
    if _grew(old, new):
        assert old.peak_bytes is not None and new.peak_bytes is not None
        return Verdict(old, "larger", f"peak memory {si(old.peak_bytes)}B -> {si(new.peak_bytes)}B")
    cost, spread, text = _cost(old, new)
    allowed = max(spread, NOISE)
    if cost > 1 + allowed:
        return Verdict(old, "slower", f"{text}: {cost:.2f}x the time, spread {allowed:.0%}")
    if cost < 1 / (1 + allowed):
        return Verdict(old, "faster", f"{text}: {cost:.2f}x the time")
    return Verdict(old, "same", text)


def _grew(old: Row, new: Row) -> bool:
    if old.peak_bytes is None or new.peak_bytes is None or old.peak_by != new.peak_by:
        return False
    return new.peak_bytes > old.peak_bytes * (1 + MEMORY_NOISE) + MEMORY_SLACK


def _cost(old: Row, new: Row) -> tuple[float, float, str]:
    """New time over old time, the spread that explains nothing, and the numbers."""
    assert old.median_ms is not None and new.median_ms is not None
    for yardstick, before, after in (
        ("published", old.speedup_published, new.speedup_published),
        ("reference", old.speedup_reference, new.speedup_reference),
    ):
        if old.device == "cpu" and before and after:
            spread = sum(_relative(row.speedup_quartiles, row.speedup_published or after) for row in (old, new))
            return before / after, spread, f"{number(before)}x {yardstick} -> {number(after)}x"
    spread = sum(_relative(_quartiles(row), row.median_ms or 1.0) for row in (old, new))
    return new.median_ms / old.median_ms, spread, f"{number(old.median_ms)} -> {number(new.median_ms)} ms"


def _quartiles(row: Row) -> tuple[float, float] | None:
    return None if row.q1_ms is None or row.q3_ms is None else (row.q1_ms, row.q3_ms)


def _relative(quartiles: tuple[float, float] | None, middle: float) -> float:
    return 0.0 if quartiles is None else (quartiles[1] - quartiles[0]) / middle
