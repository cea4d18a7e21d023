"""Tables of the README, written from committed result files: `python -m errseg.bench.readme [README.md]`.

A table stands between `<!-- measured FOLDER device precision target,target -->` and `<!-- end -->`; only rows of that
folder enter it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from errseg.bench.rows import OK, Row, read_cards, read_rows
from errseg.bench.table import number, si

BLOCK = re.compile(r"(<!-- measured (\S+) (\S+) (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
OWN = ("default", "cuda", "triton", "cpu", "reference")
HEADER = (
    *("", "pass", "size", "backend", "ms", "× published", "× best other", "× reference, compiled"),
    *("memory", "published"),
)


def render(text: str, root: Path) -> str:
    """The README's text with every measured table made anew; raises ErrSegError when results are missing."""

    def table(match: re.Match[str]) -> str:
        start, folder, device, precision, targets, end = match.groups()
        rows = [
            row
            for row in read_rows(root / folder)
            if (row.device, row.precision, row.status) == (device, precision, OK) and not row.tf32
        ]
        lines = [*_table(rows, targets.split(",")), "", _source(root / folder, rows)]
        return start + "\n" + "\n".join(lines) + "\n" + end

    return BLOCK.sub(table, text)


def _table(rows: Sequence[Row], targets: Iterable[str]) -> list[str]:
    lines = [_line(HEADER), _line("---" if i < 4 else "--:" for i in range(len(HEADER)))]
    for target in targets:
        groups: dict[tuple[str, str], dict[str, Row]] = {}
        for row in rows:
            if row.target == target:
                groups.setdefault((row.label, row.passing), {})[row.provider] = row
        lines += [_line(_cells(group)) for (_, passing), group in groups.items() if passing != "backward"]
    return lines


def _cells(group: dict[str, Row]) -> list[str]:
    """One size and pass: this package's fastest provider, and how it compares."""
    own = min((row for name, row in group.items() if name in OWN), key=_milliseconds)
    others = [row for name, row in group.items() if name.removesuffix("+compile") not in OWN]
    best = min(others, key=_milliseconds, default=None)
    published = group.get("published")
    compiled = group.get("reference+compile")
    times = number(own.speedup_published) if own.speedup_published else ""
    return [
        f"`{own.target}`",
        "forward + backward" if own.passing == "both" else own.passing,
        own.label,
        own.provider,
        number(own.median_ms),
        times,
        f"{times if best is published else _times(best, own)} ({best.provider})" if best else "",
        _times(compiled, own) if compiled else "",
        _memory(own),
        _memory(published) if published else "",
    ]


def _milliseconds(row: Row) -> float:
    return row.median_ms or float("inf")


def _times(other: Row, own: Row) -> str:
    return number(_milliseconds(other) / _milliseconds(own))


def _memory(row: Row) -> str:
    return "" if row.peak_bytes is None else f"{si(row.peak_bytes)}B"


def _source(folder: Path, rows: Sequence[Row]) -> str:
    """What it was measured on."""
    cards = read_cards(folder)
    used = {row.run for row in rows}
    card = cards[max(used)]
    where = card["gpu"]["name"] if "gpu" in card else f"{card['cpu']['name']}, {card['cpu']['threads']} threads"
    rounds = min(row.rounds for row in rows)
    versions = f"torch {card['versions']['torch']}"
    commits = ", ".join(dict.fromkeys(f"`{cards[run]['git']['commit'][:7]}`" for run in sorted(used)))
    return f"Measured {card['date'][:10]} on {where}, {versions}, at {commits}; medians of {rounds} rounds or more."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(readme: Path) -> None:
    """Rewrite the tables of a README that stands in the root of the checkout."""
    readme.write_text(render(readme.read_text(encoding="utf-8"), readme.parent), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "README.md"))
