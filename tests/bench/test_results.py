"""Rows on disk, comparisons, tables, plots, machine cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from errseg.bench import plots
from errseg.bench.cases import Case
from errseg.bench.compare import compare
from errseg.bench.machine import machine_card, results_folder
from errseg.bench.registry import find_target
from errseg.bench.rows import Row, append_card, append_rows, read_rows
from errseg.bench.table import number, promises, show_reasons, show_rows, si
from errseg.errors import ErrSegError
from tests.bench.fakes import CASE, row


def folder(path: Path, *rows: Row, machine: str = "box") -> Path:
    append_card(path, {"run": "r", "machine": machine})
    append_rows(path, rows)
    return path


def test_rows_survive_json(tmp_path: Path) -> None:
    rows = [row(), row("published", status="failed", reason="why", median_ms=None, speedup_quartiles=None)]
    assert read_rows(folder(tmp_path, *rows)) == rows
    assert rows[0].size == CASE
    output = Case(output=(512, 683))
    assert Case.from_dict(json.loads(json.dumps(output.to_dict()))) == output


def test_the_last_row_of_a_key_counts(tmp_path: Path) -> None:
    folder(tmp_path, row(median_ms=1.0), row("reference"))
    folder(tmp_path, row(median_ms=3.0))
    assert [(r.provider, r.median_ms) for r in read_rows(tmp_path)] == [("cpu", 3.0), ("reference", 2.0)]


def test_damaged_results_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match=r"has no rows\.jsonl"):
        read_rows(tmp_path)
    for text, message in (("", "is empty"), ("{}\n", "not a row"), ("[1\n", "not a row"), ("3\n", "not a row")):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ErrSegError, match=message):
            read_rows(tmp_path)


def verdicts(tmp_path: Path, old: list[Row], new: list[Row]) -> list[str]:
    return [v.kind for v in compare(folder(tmp_path / "a", *old), folder(tmp_path / "b", *new))]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "same"),
        ({"speedup_published": 9.8}, "same"),  # within the spread
        ({"speedup_published": 7.0}, "slower"),
        ({"speedup_published": 7.0, "speedup_quartiles": (5.0, 9.0)}, "same"),
        ({"speedup_published": 20.0, "speedup_quartiles": (19.9, 20.1)}, "faster"),
        ({"median_ms": 50.0}, "same"),  # a busy machine: the ratio holds
        ({"peak_bytes": 50_000_000}, "larger"),
        ({"status": "failed", "reason": "x", "median_ms": None}, "failed"),
        ({"status": "unavailable", "reason": "x", "median_ms": None}, "missing"),
        ({"precision": "bfloat16"}, "missing"),
    ],
)
def test_verdicts_on_a_cpu(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    assert verdicts(tmp_path, [row()], [row(**changes)]) == [kind]


def test_verdicts_on_a_gpu_are_about_times(tmp_path: Path) -> None:
    old = row(device="cuda")
    assert verdicts(tmp_path / "1", [old], [replace(old, speedup_published=1.0)]) == ["same"]
    slow = replace(old, median_ms=3.0, q1_ms=2.9, q3_ms=3.1)
    assert verdicts(tmp_path / "2", [old], [slow]) == ["slower"]


def test_without_published_the_reference_is_the_yardstick(tmp_path: Path) -> None:
    old = row(speedup_published=None, speedup_quartiles=(4.9, 5.1))
    assert verdicts(tmp_path, [old], [replace(old, speedup_reference=3.0)]) == ["slower"]


def test_comparing_nothing_or_different_machines_is_an_error(tmp_path: Path) -> None:
    failed = folder(tmp_path / "a", row(status="failed", median_ms=None))
    with pytest.raises(ErrSegError, match="holds no measured row"):
        compare(failed, folder(tmp_path / "b", row()))
    with pytest.raises(ErrSegError, match="one machine"):
        compare(tmp_path / "b", folder(tmp_path / "c", row(), machine="other"))


def test_the_table_has_ratios_precision_and_reasons() -> None:
    console = Console(width=140, record=True, quiet=True)
    rows = [row("published", speedup_published=1.0), row(), row("cuda", status="failed", reason="[bad] tail")]
    console.quiet = False
    with console.capture() as captured:
        show_rows(rows, console)
        show_reasons(rows, console)
    text = captured.get()
    for words in ("10x", "5x", "TF32 off", "float32", "failed", "upsample_argmax, cuda: failed: [bad] tail", "1 kB"):
        assert words in text


def test_numbers() -> None:
    assert [number(v) for v in (0.01234, 1.5, 123.4, 4321.0, None)] == ["0.0123", "1.5", "123", "4321", ""]
    assert [si(v) for v in (12, 1500, 2.5e6, 3e9, 4e12)] == ["12 ", "1.5 k", "2.5 M", "3 G", "4 T"]


def test_promises_tell_held_from_broken() -> None:
    target = find_target("upsample_argmax")
    label = target.bars[0].case.label
    rows = [
        row("cpu", label=label, median_ms=1.0),
        row("eager", label=label, median_ms=13.0),
        row("published", label=label, median_ms=50.0),
        row("eager+compile", label=label, status="failed"),
    ]
    found = promises(target, rows)
    assert [held for _, held in found] == [True, False]
    assert "13x as fast as eager" in found[0][0]
    bce = find_target("upsample_bce")
    (text, held) = promises(bce, [row("cpu", target="upsample_bce", label=bce.bars[1].case.label, passing="both")])[0]
    assert held and "1 kB" in text


def sweep() -> list[Row]:
    made = []
    for words in (20, 150, 847, 100_000):
        case = Case(words=words)
        for provider, factor in (("published", 10.0), ("reference", 2.0), ("reference+compile", 1.5), ("cpu", 0.2)):
            ms = factor * words / 100
            made.append(
                row(
                    provider,
                    case=case.to_dict(),
                    label=case.label,
                    median_ms=ms,
                    q1_ms=0.9 * ms,
                    q3_ms=1.2 * ms,
                    floor_ms=words / 1000,
                    peak_bytes=None if provider.endswith("compile") else words * 100_000,
                )
            )
    return made


def test_curves_are_found_along_one_axis_only() -> None:
    rows = [*sweep(), row(case=Case(words=20, classes=16).to_dict(), label="other")]
    curves = plots.find_curves(rows)
    assert [(c.axis, c.points) for c in curves if c.axis == "words"] == [("words", [20, 150, 847, 100_000])]
    assert [(c.axis, c.points) for c in curves if c.axis == "classes"] == [("classes", [16, 48])]
    assert plots.find_curves([row()]) == []


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plots.draw_plots(sweep(), tmp_path, "some box")
    assert sorted(path.name for path in paths) == [
        "upsample_argmax-forward-memory-over-words-float32-cpu.png",
        "upsample_argmax-forward-time-over-words-float32-cpu.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_plots_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ErrSegError, match=r"pip install 'errseg\[bench\]'"):
        plots.draw_plots(sweep(), tmp_path, "box")


def test_the_machine_card_is_json_and_names_no_folder() -> None:
    card = machine_card(torch.device("cpu"))
    text = json.dumps(card)
    assert card["versions"]["torch"] == torch.__version__.split("+")[0] or card["versions"]["torch"]
    assert card["cpu"]["threads"] == torch.get_num_threads()
    assert set(card["git"]) == {"commit", "dirty"}
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert results_folder(torch.device("cpu")).name.endswith(card["machine"])
