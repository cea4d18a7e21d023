"""Class tables of the benchmarks: index, name, and for ADE-847 the raw id, one small file each."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

TABLES = ("coco171", "ade150", "ade847", "voc20", "voc20b", "pc59", "pc459")


class ClassRow(NamedTuple):
    """One class: its name ("a, b" are synonyms) and, for ADE-847, its raw id."""

    name: str
    raw_id: int | None = None


@cache
def class_table(name: str) -> tuple[ClassRow, ...]:
    """Rows of one of `TABLES`; a row's rank is the index in prepared labels."""
    if name not in TABLES:
        raise ValueError(f"expected one of the tables {', '.join(TABLES)}, got {name!r}")
    lines = (files(__package__) / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    assert [int(row[0]) for row in rows] == list(range(len(rows))), f"{name}.tsv is not ordered by index"
    return tuple(ClassRow(word, *map(int, raw)) for _, word, *raw in rows)


def class_names(name: str) -> tuple[str, ...]:
    """Names of one of `TABLES`, by index."""
    return tuple(row.name for row in class_table(name))
