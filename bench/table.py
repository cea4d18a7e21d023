"""Results for people: one table per target, size and pass; promises below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from errseg.bench.registry import Bar, Target
from errseg.bench.rows import OK, Row


def show_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the rows, grouped by what can be compared."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.label, row.precision, str(row.tf32), row.passing), []).append(row)
    for members in groups.values():
        console.print(_table(members))


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    precision = f"{first.precision}, TF32 {'on' if first.tf32 else 'off'}"
    title = f"{first.target}, {first.passing}: {first.label}, {precision}, {first.device}"
    if first.floor_ms or any(row.floor_ms for row in rows):
        floor = next(row for row in rows if row.floor_ms)
        flops = floor.matmul_flops + floor.vector_flops
        title += f"\n{si(flops)}FLOP, {si(floor.bytes)}B, roofline {number(floor.floor_ms)} ms"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("provider", no_wrap=True)
    for name in ("median ms", "IQR ms", "x published", "x reference", "roofline", "peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.provider, *(_cells(row) if row.status == OK else _excuse(row)))
    return table


def _cells(row: Row) -> list[str]:
    assert row.median_ms is not None and row.q1_ms is not None and row.q3_ms is not None
    share = "" if row.roofline_share is None else f"{row.roofline_share:.1%}"
    peak = "" if row.peak_bytes is None else f"{si(row.peak_bytes)}B"
    speedups = (_times(row.speedup_published), _times(row.speedup_reference))
    return [number(row.median_ms), number(row.q3_ms - row.q1_ms), *speedups, share, peak]


def _excuse(row: Row) -> list[Text]:
    style = "red" if row.status == "failed" else "yellow"
    return [Text(row.status, style=style), *[Text("")] * 5]


def show_reasons(rows: Iterable[Row], console: Console) -> None:
    """Say once per provider and target why rows are missing."""
    reasons = dict.fromkeys(
        f"{row.target}, {row.provider}: {row.status}: {row.reason}" for row in rows if row.status != OK
    )
    for reason in reasons:
        console.print(Text(reason), soft_wrap=True)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def si(value: float) -> str:
    """Three significant digits with a decimal prefix, ready for a unit."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _times(value: float | None) -> str:
    return "" if value is None else f"{number(value)}x"


def promises(target: Target, rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What a target promises and these rows can tell, each with whether it held."""
    found = []
    for bar in target.bars:
        sentence = _verdict(target, bar, [row for row in rows if row.target == target.name])
        if sentence is not None:
            found.append(sentence)
    return found


def _verdict(target: Target, bar: Bar, rows: Sequence[Row]) -> tuple[str, bool] | None:
    fitting = {
        row.provider: row
        for row in rows
        if (row.label, row.passing, row.precision, row.device, row.status)
        == (bar.case.label, bar.passing, "float32", "cpu", OK)
    }
    own, other = fitting.get(bar.provider), fitting.get(bar.over)
    where = f"{target.name} [{bar.case.label}] {bar.passing}: {bar.provider}"
    if own is not None and bar.peak_bytes and own.peak_bytes is not None:
        held = own.peak_bytes <= bar.peak_bytes
        return f"{where} needs {si(own.peak_bytes)}B, promised at most {si(bar.peak_bytes)}B", held
    if own is None or other is None or not own.median_ms or not other.median_ms:
        return None
    ratio = other.median_ms / own.median_ms
    return f"{where} is {ratio:.3g}x as fast as {bar.over}, promised {bar.times:.3g}x", ratio >= bar.times
