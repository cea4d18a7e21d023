"""The README's tables say what the committed result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from errseg.bench import readme
from errseg.bench.rows import Row, append_card, append_rows
from errseg.errors import ErrSegError

ROOT = Path(__file__).parents[2]
PAGE = "before\n<!-- measured results cpu float32 argmax -->\nold\n<!-- end -->\nafter\n"
CPU = {"name": "Some CPU", "threads": 2}
GIT = {"commit": "0123456789"}
CARD = {"run": "r", "date": "2026-01-02T03:04:05", "cpu": CPU, "versions": {"torch": "2"}, "git": GIT}


def row(provider: str, milliseconds: float, **values) -> Row:
    fixed = {"run": "r", "target": "argmax", "case": {}, "label": "b B1", "passing": "forward", "precision": "float32"}
    more = {"tf32": False, "device": "cpu", "status": "ok", "rounds": 5, "median_ms": milliseconds}
    return Row(provider=provider, **(fixed | more | values))


def test_the_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.render(text, ROOT) == text


def test_ratios_are_to_the_published_and_to_the_best_of_the_others(tmp_path: Path) -> None:
    append_card(tmp_path / "results", CARD)
    rows = [row("published", 800.0, peak_bytes=3_000_000), row("eager", 40.0), row("eager+compile", 20.0)]
    rows += [row("reference", 30.0), row("reference+compile", 10.0)]
    rows += [row("cpu", 2.0, peak_bytes=1000, speedup_published=410.0)]
    append_rows(tmp_path / "results", [*rows, row("cpu", 1.0, tf32=True), row("cpu", 1.0, precision="bfloat16")])
    page = readme.render(PAGE, tmp_path)
    assert "| `argmax` | forward | b B1 | cpu | 2 | 410 | 10 (eager+compile) | 5 | 1 kB | 3 MB |" in page
    assert "Measured 2026-01-02 on Some CPU, 2 threads, torch 2, at `0123456`; medians of 5 rounds or more." in page
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert readme.render(page, tmp_path) == page


def test_what_nothing_was_measured_beside_stands_alone(tmp_path: Path) -> None:
    append_card(tmp_path / "results", CARD)
    append_rows(tmp_path / "results", [row("cpu", 2.0, peak_bytes=1000)])
    assert "| `argmax` | forward | b B1 | cpu | 2 |  |  |  | 1 kB |  |" in readme.render(PAGE, tmp_path)


def test_missing_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match="no rows"):
        readme.render(PAGE, tmp_path)
