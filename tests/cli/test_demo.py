"""`errseg demo` on a few scenes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from errseg.cli import app
from errseg.train import toy as recipes

runner = CliRunner()


def test_demo_writes_pictures_and_a_table(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--scenes", "2", "--pictures", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "toy world" in result.output and "photographs need the published weights" in result.output.lower()
    for words in ("mIoU, words never seen", "pixel accuracy, unseen objects", "raw cosines"):
        assert words in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coarse.png", "scene-0.png", "scenes.png"]
    with Image.open(tmp_path / "scene-0.png") as picture:
        assert picture.width > 4 * 480 and picture.height > 480


def test_demo_retrains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(
        recipes.Recipe,
        scenes=2,
        batch_size=1,
        tower_steps=1,
        joint_steps=1,
        decoder_images=1,
        num_selected=10,
        processes=1,
    )
    monkeypatch.setattr(recipes, "Recipe", short)
    result = runner.invoke(app, ["demo", "--retrain", "--scenes", "1", "--pictures", "0", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["errseg-tiny.safetensors"]
    assert "against the shipped weights" in " ".join(result.output.split())


def test_demo_needs_accelerate_only_to_retrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = runner.invoke(app, ["demo", "--retrain", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "pip install accelerate" in result.output


def test_demo_says_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = runner.invoke(app, ["demo", "--out", str(tmp_path / "taken")])
    assert result.exit_code == 2 and "taken" in result.output
