"""`errseg bench` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errseg.cli import app


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    providers = "published,reference"
    code, out, _ = invoke("gated_mlp", "--quick", "--providers", providers, "--passes", "forward", "--out", str(folder))
    assert code == 0
    assert "gated_mlp, forward" in out and "x published" in out and "TF32 off" in out
    return folder


def test_quick_writes_rows_and_a_card(results: Path) -> None:
    rows = [json.loads(line) for line in (results / "rows.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["published", "reference"]
    assert all(row["status"] == "ok" and row["roofline_share"] > 0 for row in rows)
    (card,) = [json.loads(line) for line in (results / "machines.jsonl").read_text().splitlines()]
    assert card["run"] == rows[0]["run"]
    assert card["ceilings"]["float32"]["copy_bytes_per_s"] > 0
    assert "gpu" not in card and card["request"]["targets"] == ["gated_mlp"]


def test_compare_finds_missing_rows(results: Path, tmp_path: Path) -> None:
    code, out, _ = invoke("--compare", str(results), str(results))
    assert code == 0 and "2 rows compared, 0 of them worse" in out
    lines = (results / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "machines.jsonl").write_text((results / "machines.jsonl").read_text())
    code, out, _ = invoke("--compare", str(results), str(tmp_path))
    assert code == 1 and "missing" in out and "1 of them worse" in out


def test_nothing_measured_is_a_failure(tmp_path: Path) -> None:
    code, out, err = invoke("gated_mlp", "--quick", "--device", "cpu", "--providers", "cuda", "--out", str(tmp_path))
    assert code == 1
    assert "nothing was measured" in err and "cuda does not run on cpu tensors" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gated"], "no benchmark 'gated'"),
        (["--providers", "best"], "no provider 'best'"),
        (["--dtype", "int8"], "no precision 'int8'"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--passes", "sideways"], "no pass 'sideways'"),
        (["--compare", "nowhere", "elsewhere"], "nowhere has no machines.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = invoke(*arguments, "--out", str(tmp_path))
    assert code == 2 and message in err and err.count("\n") == 1


def test_list() -> None:
    code, out, _ = invoke("--list")
    assert code == 0
    assert "class_votes: forward" in out and "T100000" in out and "train: step" in out
