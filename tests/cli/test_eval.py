"""`errseg eval` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from errseg.cli import app
from errseg.data.toy import WORDS, ToyWorld


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A configuration beside the one toy scene it evaluates."""
    scene = ToyWorld(1)[0]
    for name, values in (("images", scene.image), ("labels", scene.labels.astype(np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "scene.png")
    (tmp_path / "classes.txt").write_text("\n".join(WORDS))
    path = tmp_path / "toy.yaml"
    path.write_text(f"data: {{folder: {tmp_path}}}\nmodel: {{name: errseg-tiny}}\neval: {{published_miou: 50}}\n")
    return path


def test_scores_files_and_a_second_run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy.parent)
    first = run(toy, "--device", "cpu", "--predictions", "--per-class")
    assert first.exit_code == 0, first.stderr
    for text in ("mIoU (classes in the truth)", "fwIoU", "published mIoU", "50.0", WORDS[0], "1 pictures, errseg-tiny"):
        assert text in first.stdout
    assert first.stdout.endswith("written to errseg-eval/toy\n")
    out = toy.parent / "errseg-eval/toy"
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    parts = "parts/run0000-process0000.safetensors"
    assert written == ["classes.tsv", "confusion.safetensors", parts, "predictions/scene.png", "result.json"]
    facts = json.loads((out / "result.json").read_text())
    assert facts["metrics"]["pacc"] > 85 and facts["config"]["eval"]["predictions"] is True
    second = run(toy, "--device", "cpu", "--predictions")
    assert second.exit_code == 0 and WORDS[0] not in second.stdout
    assert json.loads((out / "result.json").read_text())["metrics"] == facts["metrics"]
    assert len(list((out / "parts").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("no-such",), "no-such: no such file, and no configuration of that name: ade150-b"),
        (("ade150-b", "--root", "nowhere"), "ADE-150: no labelled pictures, nothing fits in nowhere"),
        (("ade150-b", "--set", "model.sise=3"), "ade150-b.yaml: model: unknown setting 'sise': did you mean size?"),
        (("ade150-b", "--set", "eval.batch_size=x"), "eval: batch_size: expected int or nothing, got 'x'"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and line in result.stderr and result.stderr.count("\n") == 1
