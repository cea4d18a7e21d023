"""`errseg vocab build`: a file of words to a file of embeddings, whatever happens on the way."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from errseg.cli import app
from errseg.cli.progress import format_rate, format_seconds
from errseg.vocabulary import Vocabulary

KNOWN = [
    "arrow",
    "black",
    "blue",
    "brick",
    "circle",
    "cross",
    "flower",
    "grass",
    "gravel",
    "green",
    "heart",
    "moon",
    "orange",
    "purple",
    "red",
    "ring",
    "sand",
    "sky",
]


def run(*args: object) -> Result:
    line = ["vocab", "build", *map(str, args), "--model", "errseg-tiny", "--device", "cpu"]
    return CliRunner().invoke(app, line)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("red star\ngrass, sand\nred star\n")
    return path


def test_build(words: Path, tmp_path: Path) -> None:
    result = run(words)
    assert result.exit_code == 0, result.output
    line = rf"3 words in {re.escape(str(tmp_path))}/words.safetensors, 0\.0 MB \(\S+ s, \S+ words/s\)\n"
    assert re.fullmatch(line, result.stdout) and result.stderr == ""
    built = Vocabulary.load(tmp_path / "words.safetensors")
    assert built.synonyms == [["red star"], ["grass", "sand"], ["red star"]]
    assert built.embeddings.shape == (3, 128) and torch.equal(built.embeddings[0], built.embeddings[2])
    assert built.model == "errseg-tiny" and built.rule == "first"
    again = run(words)
    assert again.exit_code == 0 and "3 of them before" in again.stdout


def test_options(words: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "other.safetensors"
    result = run(words, "--out", out, "--prompt", "the {}", "--synonyms", "mean", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    built = Vocabulary.load(out)
    assert (built.prompt, built.rule, built.embeddings.dtype) == ("the {}", "mean", torch.bfloat16)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["gone.txt"], "gone.txt: cannot read the words file"),
        (["{words}", "--dtype", "int8"], "--dtype: expected one of float32"),
        (["{words}", "--prompt", "none"], "prompt: expected a sentence with one {}"),
        (["{words}", "--synonyms", "last"], "synonyms: expected one of first, mean"),
        (["{words}", "--out", "words.bin"], "cannot write words.bin: a vocabulary is a .safetensors file"),
        (["{words}", "--out", "{words}/v.safetensors"], "cannot write"),
        (["{unknown}"], "this model does not know 'zebra'"),
    ],
)
def test_mistakes_are_one_line(words: Path, tmp_path: Path, args: list[str], line: str) -> None:
    (tmp_path / "unknown.txt").write_text("grass\nzebra\n")
    places = {"{words}": str(words), "{unknown}": str(tmp_path / "unknown.txt")}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and line in result.stderr


def test_other_words_are_refused(words: Path) -> None:
    assert run(words).exit_code == 0
    words.write_text("red star\n")
    result = run(words)
    assert result.exit_code == 2 and "was made with other words: delete it" in result.stderr


def test_large_models_say_where_their_weights_are(words: Path) -> None:
    result = CliRunner().invoke(app, ["vocab", "build", str(words)])
    assert result.exit_code == 2 and "lchen1019/ERR-Seg" in result.stderr


_KILLED = """
import os, signal
from errseg import vocabulary_file
append = vocabulary_file.GrowingFile.append

def killed(file, rows):
    if file.done:
        file.file.write(bytes(1000))
        file.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(file, rows)

vocabulary_file.GrowingFile.append = killed
from errseg.cli import main
main()
"""


def test_a_build_goes_on_after_a_kill(tmp_path: Path) -> None:
    path, partial = tmp_path / "words.txt", tmp_path / "words.safetensors.partial"
    path.write_text("\n".join(" ".join(names) for names in product(KNOWN, KNOWN[:16], KNOWN[:8])))  # 2,304 words
    command = ["vocab", "build", str(path), "--model", "errseg-tiny", "--device", "cpu"]
    assert subprocess.run([sys.executable, "-c", _KILLED, *command]).returncode == -signal.SIGKILL
    assert partial.exists() and not (tmp_path / "words.safetensors").exists()
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "2,304 words" in result.stdout and "2,048 of them before" in result.stdout and not partial.exists()
    built = Vocabulary.load(tmp_path / "words.safetensors")
    assert len(built) == 2_304 and bool(((built.embeddings.norm(dim=1) - 1).abs() < 1e-5).all())


def test_an_interrupt_says_what_is_kept(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("errseg.vocabulary_file.GrowingFile.append", interrupt)
    result = run(words)
    assert result.exit_code == 130
    assert f"kept in {tmp_path}/words.safetensors.partial" in result.stderr
    assert result.stderr.splitlines()[-1] == "interrupted"


def test_without_a_terminal_lines_tell_rate_and_rest(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errseg.cli.progress.LINE_SECONDS", 0)
    monkeypatch.setattr("errseg.vocabulary._BUILD_ROWS", 2)
    words.write_text("red star\ngrass\nsky\nwater\nsand\n")
    lines = run(words).stderr.splitlines()
    assert re.fullmatch(r"2 of 5 words, \S+ words/s, \S+ s left", lines[0])
    assert re.fullmatch(r"5 of 5 words, \S+ words/s, 0 s left", lines[-1])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (42.4, "42.4 s"), (180, "3 min"), (4_800, "1 h 20 min"), (3_599, "1 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rates() -> None:
    assert [format_rate(rate) for rate in (0.1234, 12.34, 123.4, 12_345.6)] == ["0.123", "12.3", "123", "12,346"]
