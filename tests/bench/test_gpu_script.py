"""bench/gpu.sh: stages, stamps, stopping; with an interpreter that only writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from errseg.bench import determinism, sanitize

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$RECORD"
case "$*" in
    *FAIL_ME* | *"${FAILING:-nothing fails}"*) exit 3 ;;
    *"${SLOW:-nothing is slow}"*) echo $$ > "$RECORD.pid"; sleep 60 ;;
    *"print(*ops.OPS)"*) echo class_votes upsample_bce ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("errseg", "kernels", "csrc", "bench", "tests"):
        (root / folder).mkdir(parents=True)
    for file in ("setup.py", "pyproject.toml", "errseg/a.py"):
        (root / file).write_text("1\n")
    shutil.copy(SCRIPT, root / "bench" / "gpu.sh")
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return root


def command(checkout: Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    record = checkout.parent / "record"
    known = {"PYTHON": str(checkout.parent / "python"), "RECORD": str(record), "GIT_DIR": str(checkout / "no-git")}
    environment = {k: v for k, v in os.environ.items() if k != "OUT"} | known | variables
    return ["bash", str(checkout / "bench" / "gpu.sh"), *arguments], environment


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(checkout, *arguments, **variables)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, cwd=checkout.parent)


def recorded(checkout: Path) -> list[str]:
    record = checkout.parent / "record"
    lines = record.read_text().splitlines() if record.exists() else []
    record.unlink(missing_ok=True)
    return [line for line in lines if line.startswith("-m")]


def test_dry_mode_names_every_stage_and_runs_nothing(checkout: Path) -> None:
    done = run(checkout, "results", ERRSEG_GPU_SH_DRY="1")
    assert done.returncode == 0, done.stderr
    assert [line[-1] for line in done.stdout.splitlines() if line.startswith("==== stage")] == list("12345678")
    for words in ("verify --quick", "bench class_votes", "bench head", "bench model", "bench train", "racecheck"):
        assert words in done.stdout
    assert recorded(checkout) == []
    assert not list((checkout.parent / "results" / "done").rglob("bench-*"))


def test_what_is_done_is_skipped_until_the_sources_change(checkout: Path) -> None:
    assert run(checkout, "--stages", "6,8", "results").returncode == 0
    calls = recorded(checkout)
    assert len(calls) == 2 and " bench --device cuda " in calls[0] and "determinism" in calls[1]
    assert (checkout.parent / "results" / "logs" / "determinism.log").exists()
    again = run(checkout, "--stages=6,8", "results")
    assert again.returncode == 0 and again.stdout.count("done before") == 2
    assert recorded(checkout) == []
    (checkout / "errseg" / "a.py").write_text("2\n")
    assert run(checkout, "--stages", "8", "results").returncode == 0
    assert len(recorded(checkout)) == 1


def test_a_failure_is_reported_repeated_and_does_not_stop_the_rest(checkout: Path) -> None:
    failed = run(checkout, "--stages", "6,8", "results", FAILING="bench --device")
    assert failed.returncode == 1 and "FAILED: bench-train" in failed.stderr
    assert len(recorded(checkout)) == 2
    assert run(checkout, "--stages", "6,8", "results").returncode == 0
    calls = recorded(checkout)
    assert len(calls) == 1 and " train " in calls[0]


def test_stopping_keeps_what_is_done_and_leaves_no_process(checkout: Path) -> None:
    line, environment = command(checkout, "--stages", "6,8", "results", SLOW="determinism")
    process = subprocess.Popen(line, env=environment, cwd=checkout.parent, stdout=subprocess.DEVNULL)
    pid_file = checkout.parent / "record.pid"
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    child = int(pid_file.read_text())
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)
    recorded(checkout)
    assert run(checkout, "--stages", "6,8", "results").returncode == 0
    assert [line for line in recorded(checkout) if "train" in line] == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("arguments", [("--stages", "9"), ("--stages", "1;2"), ("--stages",), ("--fast",)])
def test_bad_arguments_are_refused(checkout: Path, arguments: tuple[str, ...]) -> None:
    done = run(checkout, *arguments)
    assert done.returncode == 2 and done.stderr
    assert recorded(checkout) == []


def test_help() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "--stages 1,3" in done.stdout and "compute-sanitizer" in done.stdout


def test_the_sanitizer_driver_runs_every_op_of_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--backend", "reference"]) == 0
    assert "upsample_bce reference bfloat16: ran" in capsys.readouterr().out


def test_nothing_to_sanitize_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "exercises", lambda *args: iter(()))
    assert sanitize.main(["--backend", "cuda"]) == 1


def test_chance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from errseg.bench.exercise import ODD, exercises

    exercise = next(iter(exercises("reference", torch.device("cpu"), ODD)))
    assert determinism.differing_runs(exercise, 3) == 0
    monkeypatch.setattr(type(exercise), "run", lambda self: [torch.rand(3)])
    assert determinism.differing_runs(exercise, 3) == 2
