"""`errseg segment`: files in, files out, one line per failure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from errseg.cli import app
from errseg.data.labels import load_labels
from errseg.model.errseg import create_model, save_model
from errseg.vocabulary import Vocabulary

WORDS = "red star, grass, sky|water"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(create_model("errseg-tiny", "random"), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, size in (("a.png", (40, 30)), ("x/a.png", (30, 50)), ("x/b.jpg", (64, 64))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def run(*args: object, weights: Path, words: str | None = WORDS) -> Result:
    line = ["segment", *map(str, args), "--model", "errseg-tiny", "--weights", str(weights), "--device", "cpu"]
    return CliRunner().invoke(app, [*line, *([] if words is None else ["--words", words])])


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_folder(photos: Path, weights: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", tmp_path / "out", "--batch-size", 2, weights=weights)
    assert result.exit_code == 0, result.output
    assert re.search(r"^3 of 3 pictures segmented into \S+ \(\S+ s, \d+(\.\d+)? images/s\)$", result.stdout, re.M)
    stems = ("a", "x/a", "x/b")
    endings = (".json", ".labels.png", ".overlay.png")
    assert names(tmp_path / "out") == sorted(stem + ending for stem in stems for ending in endings)
    assert load_labels(tmp_path / "out/x/a.labels.png").shape == (50, 30)
    facts = json.loads((tmp_path / "out/x/b.json").read_text())
    assert facts["image"] == str(photos / "x/b.jpg")
    assert {entry["word"] for entry in facts["selected"]} == {"red star", "grass", "sky"}


def test_a_bad_file_is_reported_and_the_rest_goes_on(photos: Path, weights: Path, tmp_path: Path) -> None:
    (photos / "cut.jpg").write_bytes((photos / "x/b.jpg").read_bytes()[:700])
    (photos / "empty.png").write_bytes(b"")
    out = tmp_path / "out"
    result = run(photos, photos / "gone.png", f"{photos}/*.bmp", "--out", out, "--batch-size", 2, weights=weights)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith(f"error: {photos}") for line in lines)
    assert "3 of 7 pictures segmented" in result.stdout and "4 failed" in result.stdout
    assert len(names(out)) == 9


def test_resuming_leaves_what_is_finished(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(photos / "a.png", photos / "x", "--out", out, "--resume", weights=weights)
    assert first.exit_code == 0 and "3 of 3 pictures segmented" in first.stdout
    (out / "a.json").unlink()  # an interruption before all was written
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    again = run(photos / "a.png", photos / "x", "--out", out, "--resume", "--json", weights=weights)
    *lines, sums = map(json.loads, again.stdout.splitlines())
    assert [line["image"] for line in lines] == [str(photos / "a.png")]
    assert (sums["pictures"], sums["kept"], sums["failed"]) == (1, 2, 0)
    written = {name for name in names(out) if before.get(name) != (out / name).stat().st_mtime_ns}
    assert written == {"a.json", "a.labels.png", "a.overlay.png"}
    for name, content in (("a.labels.png", b""), ("a.json", b"{")):
        good = (out / name).read_bytes()
        (out / name).write_bytes(content)
        spoilt = run(photos / "a.png", "--out", out, "--resume", weights=weights)
        assert "1 of 1 pictures segmented" in spoilt.stdout and (out / name).read_bytes() == good
    full = run(photos / "a.png", photos / "x", "--out", out, "--resume", weights=weights)
    assert full.exit_code == 0 and f"0 of 0 pictures segmented into {out}, 3 more were there" in full.stdout


@pytest.mark.parametrize(
    ("words", "options", "kept"),
    [
        (WORDS, (), 1),
        (WORDS, ("--no-overlay",), 1),
        ("grass, red star, sky|water", (), 0),
        (f"{WORDS}, sand", (), 0),
        (WORDS, ("--background", "water"), 0),
    ],
)
def test_results_for_other_words_are_not_kept(
    words: str, options: tuple[str, ...], kept: int, photos: Path, weights: Path, tmp_path: Path
) -> None:
    run(photos / "a.png", "--out", tmp_path, weights=weights)
    result = run(photos / "a.png", "--out", tmp_path, "--resume", *options, weights=weights, words=words)
    assert result.exit_code == 0 and f"{1 - kept} of {1 - kept} pictures segmented" in result.stdout


def test_globs_and_equal_names(photos: Path, weights: Path, tmp_path: Path) -> None:
    result = run(f"{photos}/*.png", f"{photos}/x/*", "--out", tmp_path / "out", "--no-overlay", weights=weights)
    assert result.exit_code == 0, result.output
    assert [n for n in names(tmp_path / "out") if n.endswith(".labels.png")] == [
        "a.labels.png",
        "a_png.labels.png",
        "b.labels.png",
    ]
    assert not list((tmp_path / "out").rglob("*.overlay.png"))


def test_output_beside_the_pictures_is_not_segmented_again(photos: Path, weights: Path) -> None:
    for _ in range(2):
        result = run(photos, "--out", photos, weights=weights)
        assert "3 of 3 pictures" in result.stdout
    assert len(names(photos)) == 3 + 9


def test_words_file_background_threshold_timings(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("red star\ngrass, sand\n")
    options = ["--words-file", tmp_path / "words.txt", "--background", "sky, water", "--threshold", "0.5", "--timings"]
    options += ["--synonyms", "mean", "--size", "96", "--num-selected", "3", "--dtype", "bfloat16"]
    options += ["--prompt", "the {}", "--protocol", "published", "--out", tmp_path / "out"]
    result = run(photos / "a.png", *options, weights=weights, words=None)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out/a.json").read_text())
    assert facts["vocabulary_size"] == 3
    assert {area["word"] for area in facts["areas"]} <= {"red star", "grass", "background", None}
    for stage in ("read", "preprocess", "text", "towers", "guidance", "rrhc", "rrca", "upsampler", "labels", "save"):
        assert stage in result.stdout


def test_saved_vocabulary(photos: Path, weights: Path, tmp_path: Path) -> None:
    Vocabulary(["this", "that"], torch.randn(2, 128)).save(tmp_path / "v.safetensors")
    options = ["--vocabulary", tmp_path / "v.safetensors", "--out", tmp_path / "out"]
    assert run(photos / "a.png", *options, weights=weights, words=None).exit_code == 0
    result = run(photos / "a.png", *options, weights=weights)
    assert result.exit_code == 2 and "one or the other" in result.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--words", ""], "word 0 is empty"),
        (["--words", "red star,,grass"], "word 1 is empty"),
        (["--words", "zebra"], "it knows only the words"),
        (["--words-file", "none.txt"], "cannot read the words file"),
        ([], "no words to look for"),
        (["--words", "grass", "--device", "cuda:99"], "no such device"),
        (["--words", "grass", "--dtype", "int8"], "--dtype: expected one of"),
        (["--words", "grass", "--size", "100"], "multiple of 32"),
        (["--words", "grass", "--threshold", "2"], "threshold"),
        (["--words", "grass", "--batch-size", "0"], "batch size: expected"),
        (["--words", "grass", "--workers", "-1"], "workers: expected"),
        (["--words", "grass", "--synonyms", "last"], "synonyms: expected"),
        (["--words", "grass", "--protocol", "new"], "protocol: expected"),
        (["--words", "grass", "--background", ""], "word 0 is empty"),
        (["--words", "grass", "--weights", "missing.pth"], "missing.pth"),
    ],
)
def test_mistakes_are_one_line(args: list[str], line: str, photos: Path, weights: Path, tmp_path: Path) -> None:
    command = ["segment", str(photos), "--model", "errseg-tiny", "--weights", str(weights)]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), *args])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and line in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_large_models_say_where_their_weights_are(photos: Path) -> None:
    result = CliRunner().invoke(app, ["segment", str(photos), "--words", "cat"])
    assert result.exit_code == 2
    assert "lchen1019/ERR-Seg" in result.stderr and "errseg-tiny" in result.stderr


def test_no_pictures(tmp_path: Path, weights: Path) -> None:
    result = run(tmp_path, weights=weights)
    assert result.exit_code == 2 and "no pictures in" in result.stderr


def test_a_result_that_cannot_be_written(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").write_text("in the way")
    result = run(photos, "--out", tmp_path / "out", weights=weights)
    assert result.exit_code == 2
    assert result.stderr.count("cannot write") == 2
    assert "1 of 3 pictures segmented" in result.stdout


@pytest.mark.parametrize("workers", [0, 3])
def test_json_lines(photos: Path, weights: Path, tmp_path: Path, workers: int) -> None:
    (photos / "cut.jpg").write_bytes((photos / "x/b.jpg").read_bytes()[:700])
    options = ["--json", "--workers", workers, "--batch-size", 2, "--timings", "--out", tmp_path / "out"]
    result = run(photos, *options, weights=weights)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    *lines, sums = map(json.loads, result.stdout.splitlines())
    done = {line["image"]: line for line in lines if "error" not in line}
    assert sorted(done) == [str(photos / name) for name in ("a.png", "x/a.png", "x/b.jpg")]
    for line in done.values():
        assert [Path(file).is_file() for file in line["files"]] == [True, True, True]
        assert sum(area["fraction"] for area in line["areas"]) == pytest.approx(1, abs=1e-4)
    assert [line["image"] for line in lines if "error" in line] == [str(photos / "cut.jpg")]
    assert (sums["pictures"], sums["failed"], sums["out"]) == (3, 1, str(tmp_path / "out"))
    assert sums["images_per_second"] == pytest.approx(3 / sums["seconds"], rel=0.01)
    assert sums["timings"]["read"] > 0 and sums["timings"]["save"] > 0


_INTERRUPTED = """
import os, signal
from errseg.segmentation import Segmentation
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
save, saved = Segmentation.save, []

def interrupting(result, path, **options):
    saved.append(path)
    if len(saved) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return save(result, path, **options)

Segmentation.save = interrupting
from errseg.cli import main
main()
"""


def test_an_interrupt_leaves_whole_files(photos: Path, weights: Path, tmp_path: Path) -> None:
    for i in range(60):
        os.link(photos / "x/b.jpg", photos / f"{i}.jpg")
    command = ["segment", str(photos), "--model", "errseg-tiny", "--weights", str(weights), "--words", "grass"]
    command += ["--device", "cpu", "--workers", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    saved = names(tmp_path / "out")
    stems = {name.removesuffix(".json") for name in saved if name.endswith(".json")}
    assert len(saved) == 3 * len(stems) and 5 <= len(stems) < 60  # nothing by halves
    counted = re.match(r"(\d+) of \1 pictures segmented", done.stdout)
    assert counted and 0 < int(counted[1]) <= len(stems)


def test_a_built_vocabulary(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("red star\ngrass\nsky\n")
    settings = ["--model", "errseg-tiny", "--weights", str(weights), "--device", "cpu"]
    built = CliRunner().invoke(app, ["vocab", "build", str(tmp_path / "words.txt"), "--dtype", "float16", *settings])
    assert built.exit_code == 0, built.output
    options = ["--vocabulary", tmp_path / "words.safetensors", "--out", tmp_path / "out"]
    assert run(photos / "a.png", *options, weights=weights, words=None).exit_code == 0
    assert json.loads((tmp_path / "out/a.json").read_text())["vocabulary_size"] == 3
    result = run(photos / "a.png", *options, "--prompt", "the {}", weights=weights, words=None)
    assert result.exit_code == 2 and "made with prompt" in result.stderr
