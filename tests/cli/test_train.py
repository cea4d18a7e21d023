"""`errseg train` as a person meets it, and the whole path from drawn scenes to scores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from errseg.cli import app
from errseg.data.toy import WORDS, ToyWorld
from tests.train.world import fresh_accelerate, make_folder

TOY = """\
data: {data}
model: {{name: errseg-tiny, size: 64, num_selected: 8}}
train:
  {{steps: {steps}, batch_size: 2, lr: 1.0e-3, warmup_steps: 10, device: cpu, dtype: float32, workers: 0,
   log_every: 20, save_every: 50, tracker: none}}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


def write(base: Path, steps: int, data: str) -> Path:
    path = base / "toy.yaml"
    path.write_text(TOY.format(data=data, steps=steps))
    return path


def write_benchmark(root: Path, count: int) -> None:
    """Scenes as the original files of a benchmark: raw labels count from 1, 0 is none of its classes."""
    base, world = root / "ADEChallengeData2016", ToyWorld(3, size=80)
    for name in ("images", "annotations"):
        (base / name / "validation").mkdir(parents=True)
    for i in range(count):
        labels = world[i].labels
        Image.fromarray(world[i].image).save(base / f"images/validation/{i}.jpg", quality=95)
        raw = np.where(labels < 150, labels + 1, 0).astype(np.uint8)
        Image.fromarray(raw).save(base / f"annotations/validation/{i}.png")


def test_generate_prepare_train_resume_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("errseg.data.datasets.benchmarks.class_names", lambda table: WORDS[:150])
    write_benchmark(tmp_path / "sets", 8)
    prepared = run("data", "prepare", "ADE-150", "sets")
    assert prepared.exit_code == 0 and prepared.stdout.startswith("ADE-150 val: 8 label maps written, 0 were there")
    data = "{set: ADE-150, split: val, root: sets}"
    config = write(tmp_path, 200, data)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, fresh_accelerate():
        # Behind step 100: its checkpoint is complete.
        patch.setattr("errseg.train.checkpoints.Checkpoints._delete", interrupt)
        first = run("train", config, "--set", "train.keep=1")
    assert first.exit_code == 130 and first.stderr.endswith("interrupted\n")
    second = run("train", config)
    assert second.exit_code == 0, second.stderr
    assert "going on from step 100, errseg-train/toy/checkpoints/step-00000100" in second.stderr
    assert second.stdout == "written to errseg-train/toy/model\n"
    lines = [json.loads(line) for line in (tmp_path / "errseg-train/toy/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    scores = {}
    for name, weights in (("before", []), ("after", ["--weights", "errseg-train/toy/model"])):
        (tmp_path / f"{name}.yaml").write_text(f"data: {data}\nmodel: {{name: errseg-tiny, size: 64}}\n")
        result = run("eval", f"{name}.yaml", "--device", "cpu", "--set", "eval.protocol=direct", *weights)
        assert result.exit_code == 0, result.stderr
        facts = json.loads((tmp_path / f"errseg-eval/{name}/result.json").read_text())
        assert (facts["set"], facts["pictures"], len(facts["classes"])) == ("ADE-150", 8, 150)
        scores[name] = facts["metrics"]["miou"]
    assert scores["after"] > scores["before"]
    assert time.perf_counter() - start < 180


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("no-such",), "no-such: no such file, and no configuration of that name: coco-b, coco-l"),
        (("coco-b", "--device", "cpu", "--root", "nowhere"), "training in float16 needs a GPU"),
        (("coco-b", "--set", "train.dtype=float32", "--root", "nowhere"), "COCO-Stuff-171: no labelled pictures"),
        (("coco-b", "--set", "train.step=3"), "coco-b.yaml: train: unknown setting 'step': did you mean steps?"),
        (("coco-b", "--fused", "no"), "--fused: expected on or off, got 'no'"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line(arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = run("train", *arguments, "--out", tmp_path / "run", "--set", "train.tracker=none")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and line in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_files_stop_or_are_skipped_and_fused_off(tmp_path: Path) -> None:
    make_folder(tmp_path / "toy", count=4)
    bad = tmp_path / "toy/images/1.png"
    bad.write_bytes(b"no picture")
    arguments = (
        "train",
        write(tmp_path, 3, f"{{folder: {tmp_path / 'toy'}}}"),
        "--out",
        tmp_path / "run",
        "--fused",
        "off",
    )
    stopped = run(*arguments)
    assert stopped.exit_code == 2 and stopped.stderr == f"error: {bad}: not a picture that Pillow can read\n"
    with fresh_accelerate():
        skipped = run(*arguments, "--set", "train.bad_files=skip", "--restart")
    assert skipped.exit_code == 0, skipped.stderr
    assert skipped.stderr.count(f"skipped: {bad}: not a picture that Pillow can read\n") == 1
    assert skipped.stdout == f"written to {tmp_path / 'run/model'}\n"
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["skipped_files"] == 1
