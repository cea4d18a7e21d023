"""Rows as a table for people and as JSON lines for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import torch

from errseg.verify.rows import FAILED, NOT_RUN, PASSED, Row, succeeded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MAX_LISTED = 20


def write_json(line: dict[str, Any], stream: IO[str]) -> None:
    """One JSON object, on disk at once: a long run that is stopped keeps what it has."""
    stream.write(json.dumps(line, allow_nan=False) + "\n")
    stream.flush()


def card(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """The first JSON line: the machine, and what was asked for."""
    from errseg.bench.machine import machine_card

    return {"kind": "machine", **machine_card(device), "verify": settings}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The last JSON line: counts and the verdict."""
    return {"kind": "summary", **count(rows), "verdict": PASSED if succeeded(list(rows)) else FAILED}


def count(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows passed, failed and were not run."""
    statuses = [row.status for row in rows]
    return {status: statuses.count(status) for status in (PASSED, FAILED, NOT_RUN)}


def show(rows: Sequence[Row], console: Console, *, verbose: bool = False) -> None:
    """Print the table, what failed, what was not run and why, and the verdict."""
    executed = [row for row in rows if row.status != NOT_RUN]
    if executed:
        console.print(all_rows(executed) if verbose else one_line_each(executed))
    failures = explain_all([row for row in rows if row.status == FAILED])
    for line in failures[:MAX_LISTED]:
        console.print(f"[red]FAILED[/] {_plain(line)}", highlight=False)
    if len(failures) > MAX_LISTED:
        console.print(f"... and {len(failures) - MAX_LISTED} more; --verbose lists every row")
    for line in not_run(rows):
        console.print(f"[yellow]not run[/] {_plain(line)}", highlight=False)
    numbers = count(rows)
    interpreted = any(row.interpreted for row in executed)
    text = f"{numbers[PASSED]} passed, {numbers[FAILED]} failed, {numbers[NOT_RUN]} not run"
    if not executed:
        text += ": nothing was executed, which is a failure"
    if interpreted:
        text += "; interpreted kernels show their arithmetic, not what a GPU does"
    console.print(f"[bold {'green' if succeeded(list(rows)) else 'red'}]{text}[/]", highlight=False)


def one_line_each(rows: Sequence[Row]) -> Table:
    """One line per op, backend and dtype, with the case that came nearest to its limit."""
    table = _table("op", "backend", "dtype", "cases", "of limit", "nearest to its limit")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.label, row.dtype), []).append(row)
    order = {op: place for place, (op, _, _) in reversed(list(enumerate(groups)))}
    for (op, backend, dtype), group in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        worst = max(group, key=lambda row: (row.status == FAILED, row.worst.severity if row.worst else 0.0))
        failures = sum(row.status == FAILED for row in group)
        cases = f"[red]{failures} of {len(group)} fail[/]" if failures else f"[green]{len(group)} pass[/]"
        table.add_row(
            op, backend, dtype, cases, _share(worst), _one_line(f"{worst.case}: {worst.worst or worst.reason}")
        )
    return table


def all_rows(rows: Sequence[Row]) -> Table:
    """One line per row."""
    table = _table("op", "backend", "dtype", "case", "verdict", "of limit", "nearest to its limit")
    for row in rows:
        verdict = "[green]pass[/]" if row.status == PASSED else "[red]FAIL[/]"
        nearest = _one_line(str(row.worst or row.reason))
        table.add_row(row.op, row.label, row.dtype, _plain(row.case), verdict, _share(row), nearest)
    return table


def explain(row: Row) -> str:
    """A failing row in one line: its name and the checks that fail."""
    wrong = [f"{check} (allowed {check.allowed:.2g})" for check in row.checks if not check.passed]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{row.name}: {'; '.join(wrong[:3]) or row.reason}{more}"


def explain_all(failures: Sequence[Row]) -> list[str]:
    """One line per failing row; rows of an op that one exception ended share a line."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in failures:
        key = (row.op, row.label, row.reason) if row.crashed else (row.name,)
        lines.setdefault(key, []).append(row)
    return [explain(group[0]) + (f" (and {len(group) - 1} more rows)" if group[1:] else "") for group in lines.values()]


def not_run(rows: Sequence[Row]) -> list[str]:
    """Why rows were not run, one line per backend and reason."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status == NOT_RUN:
            # Sizes that do not fit differ in their numbers only.
            key = row.name if row.reason.startswith("needs ") and "GB" in row.reason else ""
            groups.setdefault((row.label, f"{key}|{row.reason}"), []).append(row)
    lines = []
    for (backend, reason), group in groups.items():
        case, _, why = reason.partition("|")
        if case:
            lines.append(f"{case}: {why}")
        else:
            ops = ", ".join(dict.fromkeys(row.op for row in group))
            lines.append(f"{backend}: {why} ({len(group)} rows of {ops})")
    return lines


def _share(row: Row) -> str:
    return f"{100 * row.worst.severity:.0f} %" if row.worst else "-"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _one_line(text: str) -> Text:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Only the last column gives way on a narrow terminal.
        table.add_column(column, justify="right" if column == "of limit" else "left", no_wrap=column != columns[-1])
    return table
