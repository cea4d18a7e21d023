"""The command: table, JSON lines, exit codes, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errseg.cli import app
from errseg.verify import runner
from errseg.verify.checks import Check
from errseg.verify.rows import Row

QUICK = ["verify", "--quick", "--device", "cpu", "--backends", "reference"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command sets it where it is not set


def test_a_run_that_passes_prints_one_line_per_dtype_and_exits_with_zero() -> None:
    done = CliRunner().invoke(app, [*QUICK, "--ops", "cost_volume"])
    assert done.exit_code == 0, done.output
    lines = [line.split()[:5] for line in done.stdout.splitlines() if line.startswith("cost_volume")]
    assert [line[2] for line in lines] == ["float64", "float32", "bfloat16", "float16"]
    assert lines[0][:2] == ["cost_volume", "reference"] and lines[0][4] == "pass"
    assert "44 passed, 0 failed, 0 not run" in done.stdout


def test_verbose_lists_every_row() -> None:
    done = CliRunner().invoke(app, [*QUICK, "--ops", "select_classes", "--verbose"])
    assert done.stdout.count("pass") >= 13 and "no ground truth" in done.stdout


def test_json_lines_have_a_machine_card_and_a_verdict(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, [*QUICK, "--ops", "select_classes", "--json", str(file)])
    assert done.exit_code == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["kind"] == "machine" and lines[0]["versions"]["torch"] and lines[0]["verify"]["quick"]
    assert {line["kind"] for line in lines[1:-1]} == {"row"}
    assert lines[-1]["verdict"] == "pass" and lines[-1]["pass"] == len(lines) - 2


def test_a_run_that_is_stopped_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_case(case: Any, *args: Any) -> list[Row]:
        if case.name == "one class":
            raise KeyboardInterrupt
        return [Row(case.op, "cpu", "float32", case.name)]

    monkeypatch.setattr(runner, "run_case", run_case)
    file = tmp_path / "rows.jsonl"
    CliRunner().invoke(app, [*QUICK, "--ops", "gated_mlp", "--json", str(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("case") for line in lines] == [None, "odd sizes", "published channels"]


def test_only_chooses_cases() -> None:
    done = CliRunner().invoke(app, [*QUICK, "--ops", "cost_volume", "--only", "one class", "--only", "pixel"])
    assert done.exit_code == 0 and "8 passed, 0 failed, 0 not run" in done.stdout


def test_json_on_standard_output_stands_alone() -> None:
    done = CliRunner().invoke(app, [*QUICK, "--ops", "select_classes", "--json", "-"])
    assert all(json.loads(line)["kind"] for line in done.stdout.splitlines())
    assert "passed" in done.stderr


def test_a_failing_row_is_named_and_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check("grad x", "max", 0.5, 1e-6, 5e-7)
    monkeypatch.setattr(runner, "run_case", lambda case, *args: [Row(case.op, "cpu", "float32", case.name, (wrong,))])
    done = CliRunner().invoke(app, [*QUICK, "--ops", "gated_mlp"])
    assert done.exit_code == 1
    assert "FAILED gated_mlp cpu float32: odd sizes: grad x max 0.5, eager 5e-07 (allowed 1e-06)" in done.stdout


def test_nothing_executed_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("gated_mlp", "cuda", "float32", "odd sizes", reason="no NVIDIA GPU")
    monkeypatch.setattr(runner, "run", lambda **options: [row])
    monkeypatch.setattr("errseg.verify.run", lambda **options: [row])
    done = CliRunner().invoke(app, QUICK)
    assert done.exit_code == 1 and "nothing was executed" in done.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ops", "softmax"], "no op 'softmax': choose out of"),
        (["--backends", "tpu"], "no backend 'tpu': choose out of reference, cpu, triton, cuda"),
        (["--only", "nowhere"], "no case has 'nowhere' in its name"),
        (["--official", "no-such-folder"], "no-such-folder is no checkout of the published ERR-Seg code"),
        (["--json", "no-such-folder/rows.jsonl"], "No such file or directory"),
    ],
)
def test_mistakes_are_one_line(options: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["verify", "--quick", "--device", "cpu", *options])
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and text in done.stderr
    assert len(done.stderr.splitlines()) == 1
