"""`errseg data prepare` and `errseg data verify` as a person meets them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from errseg.cli import app
from tests.data import layouts


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_help_names_both_commands() -> None:
    for arguments in ((), ("--help",)):
        result = run(*arguments)
        assert result.exit_code == 0 and "prepare" in result.stdout and "verify" in result.stdout


def test_prepare_twice_then_verify(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    target = tmp_path / "ADEChallengeData2016/annotations_detectron2/validation"
    first, second = (run("prepare", "ade150", tmp_path, "--workers", 1) for _ in range(2))
    assert first.stdout == f"ADE-150 val: 2 label maps written, 0 were there; {target}\n" and first.exit_code == 0
    assert second.stdout == f"ADE-150 val: 0 label maps written, 2 were there; {target}\n"
    result = run("verify", "ade150", tmp_path, "--workers", 1)
    assert result.exit_code == 2 and result.stderr == "error: ADE-150: not complete, see above\n"
    assert result.stdout.splitlines() == [
        "ADE-150: NOT complete",
        "  files    2 pictures, 2 labels, expected 2,000; 2 pairs",
        "  values   150 of 150 classes occur (0 to 149); ignored (255) in 2 label maps",
        "  problem  2 labels in ADEChallengeData2016/annotations_detectron2/validation, expected 2,000",
    ]


def test_root_from_the_environment(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    result = CliRunner().invoke(
        app, ["data", "prepare", "ADE-150", "--workers", "1"], env={"ERRSEG_DATASETS": str(tmp_path)}
    )
    assert result.exit_code == 0 and "2 label maps written" in result.stdout


def test_a_bad_file_is_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    layouts.ade150(tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    path.write_bytes(b"")
    result = run("prepare", "ADE-150", tmp_path, "--workers", 1)
    assert result.exit_code == 2 and re.match(r"error: .*ADE_val_00000001\.png: .*\n$", result.stderr)
    assert "1 label maps written, 0 were there, 1 failed" in result.stdout


def test_coco_without_the_training_labels(tmp_path: Path) -> None:
    layouts.coco(tmp_path, "val")
    result = run("prepare", "COCO-Stuff-171", tmp_path, "--workers", 1)
    assert result.exit_code == 0
    assert result.stderr == "COCO-Stuff-171 train: original labels not there, passed over\n"
    assert result.stdout.startswith("COCO-Stuff-171 val: 1 label maps written")
    shown = run("verify", "COCO-Stuff-171", tmp_path).stdout
    assert "COCO-Stuff-171 train: NOT complete" in shown and "get http://images.cocodataset.org/zips/train2017" in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("prepare", "cityscapes"), "no set 'cityscapes': choose one of COCO-Stuff-171"),
        (("prepare", "ADE-150", "no-such-root"), "no-such-root: no such folder"),
        (("prepare", "own", "x"), "one's own data needs no preparation"),
        (("verify", "own"), "say which folder"),
        (("verify", "PC-59", "--split", "train"), "PC-59 has no split 'train'"),
        (("prepare", "ADE-150", "--workers", "0"), "Invalid value for '--workers'"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {line}") and result.stderr.count("\n") == 1


def test_own_folder(tmp_path: Path) -> None:
    layouts.photo(tmp_path / "images/photo.jpg", 1, 3)
    layouts.grey(tmp_path / "labels/photo.png", [[0, 1, 255]])
    layouts.text(tmp_path / "classes.txt", "cat", "sofa", "wall")
    result = run("verify", "own", tmp_path, "--workers", 1)
    assert result.exit_code == 0 and f"{tmp_path}: complete" in result.stdout
    assert "2 of 3 classes occur (0 to 1); ignored (255) in 1 label maps" in result.stdout
