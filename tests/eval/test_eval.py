"""Evaluation of the toy model on a folder of toy scenes: numbers, batches, resuming, bad files, processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from errseg import Segmenter
from errseg.configs.schema import DataSettings, EvalConfig, EvalSettings, ModelSettings
from errseg.data.datasets import find_benchmark
from errseg.data.labels import load_labels, save_labels
from errseg.data.prepare import prepare
from errseg.data.toy import WORDS, ToyWorld
from errseg.errors import ErrSegError
from errseg.eval import runner
from errseg.eval.metrics import confusion_matrix
from errseg.eval.parts import Part
from errseg.eval.report import write
from errseg.eval.runner import Evaluation, evaluate
from errseg.model.clip import DenseCLIP
from errseg.scale.processes import Processes
from tests.data import layouts
from tests.disk import files_of_at_most
from tests.launch import torchrun

PICTURES = 4
IGNORED = (0, slice(0, 40))  # rows of the first picture that are not labelled


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy scenes as one's own folder; one is cropped, so that sizes differ."""
    base = tmp_path_factory.mktemp("scenes")
    for name in ("images", "labels"):
        (base / name).mkdir()
    world = ToyWorld(777, unseen=0.5)
    for i in range(PICTURES):
        image, labels = world[i].image, world[i].labels.astype(np.uint8)
        if i == 0:
            labels[IGNORED[1]] = 255
        if i == 1:
            image, labels = image[:100], labels[:100]
        Image.fromarray(image).save(base / f"images/{i}.png")
        Image.fromarray(labels).save(base / f"labels/{i}.png")
    (base / "classes.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return base


def config(folder: Path, **settings: Any) -> EvalConfig:
    options = {"device": "cpu", "workers": 0, "batch_size": 1, **settings}
    return EvalConfig(DataSettings(folder=str(folder)), ModelSettings("errseg-tiny"), EvalSettings(**options))


def run(folder: Path, out: Path, **settings: Any) -> Evaluation:
    result = evaluate(config(folder, **settings), out)
    assert result is not None
    return result


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    """The folder again, to be spoiled."""
    for path in scenes.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(scenes)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def expected(scenes: Path) -> np.ndarray:
    """The matrix by the Segmenter and numpy alone."""
    segmenter = Segmenter("errseg-tiny", device="cpu", vocabulary=WORDS).optimize()
    total = np.zeros((len(WORDS), len(WORDS)), np.int64)
    for i in range(PICTURES):
        labels = np.asarray(Image.open(scenes / f"labels/{i}.png"))
        predicted = segmenter(str(scenes / f"images/{i}.png"), protocol="published").labels.numpy()
        total += confusion_matrix(labels[labels != 255], predicted[labels != 255], len(WORDS))
    return total


def test_the_matrix_is_that_of_the_label_maps(scenes: Path, expected: np.ndarray, tmp_path: Path) -> None:
    settings = config(scenes, predictions=True)
    result = evaluate(settings, tmp_path)
    assert result is not None and (result.metrics.confusion == expected).all()
    assert result.pictures == PICTURES and result.skipped == {}
    assert result.metrics.pacc > 90 and result.metrics.miou >= result.metrics.miou_union > 20
    predicted = load_labels(tmp_path / "predictions/1.png")
    labels = np.asarray(Image.open(scenes / "labels/1.png"))
    assert predicted.shape == labels.shape == (100, 160) and (predicted == labels).mean() > 0.9

    write(result, settings, tmp_path)
    assert (load_file(tmp_path / "confusion.safetensors")["confusion"] == expected).all()
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["metrics"] == pytest.approx(result.metrics.summary(), abs=1e-5)
    assert facts["classes"][0]["name"] == WORDS[0] and facts["config"]["model"]["name"] == "errseg-tiny"
    assert facts["settings"]["num_selected"] == 16 and facts["settings"]["protocol"] == "published"
    header, *rows = (tmp_path / "classes.tsv").read_text().splitlines()
    assert header.split("\t")[:4] == ["index", "name", "iou", "accuracy"] and len(rows) == len(WORDS)


def test_batches_give_the_same_but_for_near_ties(scenes: Path, expected: np.ndarray, tmp_path: Path) -> None:
    found = run(scenes, tmp_path, batch_size=3, workers=2).metrics.confusion
    assert found.sum() == expected.sum() and (found.sum(1) == expected.sum(1)).all()
    assert np.abs(found - expected).sum() <= 0.002 * expected.sum()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stems of the pictures that are evaluated from here on."""
    seen: list[str] = []
    count = runner._Job._count

    def spy(job: Any, pair: Any, *others: Any) -> None:
        count(job, pair, *others)
        seen.append(pair.stem)

    monkeypatch.setattr(runner._Job, "_count", spy)
    yield seen


def test_it_goes_on_where_it_was_stopped(copy: Path, expected: np.ndarray, counted: list[str], tmp_path: Path) -> None:
    good = (copy / "images/2.png").read_bytes()
    (copy / "images/2.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(ErrSegError, match=r"images/2\.png: .*(truncated|damaged|unreadable)"):
        run(copy, tmp_path / "out")
    (copy / "images/2.png").write_bytes(good)
    result = run(copy, tmp_path / "out")
    assert counted == ["0", "1", "2", "3"]
    assert (result.metrics.confusion == expected).all()
    assert (run(copy, tmp_path / "out").metrics.confusion == expected).all() and len(counted) == 4


def test_a_process_that_could_not_save_at_the_end_loses_only_what_it_had_not_saved(
    scenes: Path, expected: np.ndarray, counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Part.save, []

    def dying(part: Part, *others: Any) -> None:
        if len(saved) == 2:
            raise SystemExit  # as good as killed: nothing more reaches the disk
        saved.append(save(part, *others))

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Part, "save", dying)
        run(scenes, tmp_path, save_seconds=0.0)
    assert counted == ["0", "1", "2"]
    assert (run(scenes, tmp_path).metrics.confusion == expected).all()
    assert counted == ["0", "1", "2", "2", "3"]


def test_a_picture_whose_prediction_cannot_be_written_is_not_counted(
    scenes: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def full(labels: Any, path: Path, *others: Any) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise ErrSegError(f"cannot write {path}: No space left on device")
        return save_labels(labels, path, *others)

    with monkeypatch.context() as patch, pytest.raises(ErrSegError, match=r"cannot write .*1\.png"):
        patch.setattr(runner, "save_labels", full)
        run(scenes, tmp_path, predictions=True)
    assert (run(scenes, tmp_path, predictions=True).metrics.confusion == expected).all()
    assert len(list((tmp_path / "predictions").iterdir())) == PICTURES


def test_a_full_disk_loses_nothing(scenes: Path, expected: np.ndarray, tmp_path: Path) -> None:
    part = tmp_path / "parts/run0000-process0000.safetensors"
    with files_of_at_most(100_000), pytest.raises(ErrSegError) as caught:  # the matrix takes 226 kB
        run(scenes, tmp_path)
    assert str(caught.value) == f"cannot write {part}: File too large"
    assert not list(part.parent.iterdir())  # nothing by halves
    assert (run(scenes, tmp_path).metrics.confusion == expected).all()
    with files_of_at_most(100_000), pytest.raises(ErrSegError, match=r"cannot write .*confusion\.safetensors: "):
        write(run(scenes, tmp_path), config(scenes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_predictions_asked_for_later_are_missed(scenes: Path, tmp_path: Path) -> None:
    run(scenes, tmp_path)
    with pytest.raises(
        ErrSegError, match=r"^4 pictures were evaluated without writing predictions, 0 for .*--restart$"
    ):
        run(scenes, tmp_path, predictions=True)
    assert evaluate(config(scenes, predictions=True), tmp_path, restart=True) is not None
    run(scenes, tmp_path, predictions=True)
    assert evaluate(config(scenes), tmp_path, restart=True) is not None
    with pytest.raises(ErrSegError, match=r"^4 pictures were evaluated without"):  # those of before are not these
        run(scenes, tmp_path, predictions=True)


def test_labels_that_have_changed_are_no_old_matrix(copy: Path, counted: list[str], tmp_path: Path) -> None:
    out, label = tmp_path / "out", copy / "labels/2.png"
    run(copy, out)
    good, stat = label.read_bytes(), label.stat()
    Image.fromarray(np.zeros_like(np.asarray(Image.open(label)))).save(label)
    with pytest.raises(ErrSegError) as caught:
        run(copy, out)
    assert str(caught.value).startswith(f"{label} or its picture has changed since it was evaluated (1 such pairs): ")
    label.write_bytes(good)  # at another time, but the same
    assert label.stat().st_mtime_ns != stat.st_mtime_ns
    assert run(copy, out).pictures == PICTURES and len(counted) == PICTURES


def test_the_folder_of_another_evaluation_is_refused(scenes: Path, expected: np.ndarray, tmp_path: Path) -> None:
    run(scenes, tmp_path)
    other = config(scenes, protocol="direct")
    with pytest.raises(ErrSegError, match=r"is of another evaluation .* begin anew with --restart"):
        evaluate(other, tmp_path)
    result = evaluate(other, tmp_path, restart=True)
    assert result is not None and result.metrics.confusion.sum() == expected.sum()
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ErrSegError, match=r"safetensors: damaged .* delete it"):
        evaluate(other, tmp_path)


def test_bad_files_stop_it_or_are_skipped(copy: Path, tmp_path: Path) -> None:
    picture, label, size = copy / "images/0.png", copy / "labels/1.png", copy / "labels/2.png"
    picture.write_bytes(b"")
    Image.fromarray(np.full((100, 160), 200, np.uint8)).save(label)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(size)
    reasons = {
        "0": f"{picture}: ",
        "1": f"{label}: label 200 is out of range (classes 0 to 167, ignored 255)",
        "2": f"{size}: 10 x 20 pixels, its picture 160 x 160",
    }
    result = run(copy, tmp_path / "skipping", bad_files="skip")
    assert result.pictures == 1 and result.skipped.keys() == reasons.keys()
    assert all(result.skipped[stem].startswith(reason) for stem, reason in reasons.items())
    for stem in ("0", "1"):
        with pytest.raises(ErrSegError) as caught:
            run(copy, tmp_path / "stopping")
        assert str(caught.value).startswith(reasons[stem]) and "\n" not in str(caught.value)
        picture.write_bytes((copy / "images/2.png").read_bytes())
    # A file that has been mended is evaluated after all.
    again = run(copy, tmp_path / "skipping", bad_files="skip")
    assert again.pictures == 2 and again.skipped.keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("name", "classes", "ignore"), [("PAS-20b", 21, 255), ("ADE-847", 847, 65535), ("PC-459", 459, 459)]
)
def test_benchmarks_score_their_own_classes(
    name: str, classes: int, ignore: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = layouts.BUILDERS[name](tmp_path)
    prepare(name, tmp_path, workers=1)
    asked: list[str] = []

    def embed(self: DenseCLIP, words: list[str], **options: Any) -> torch.Tensor:
        asked.extend(words)  # the toy model does not know these: any embeddings will do
        return torch.nn.functional.normalize(torch.randn(len(words), 128), dim=1)

    monkeypatch.setattr(DenseCLIP, "embed_words", embed)
    settings = EvalConfig(
        DataSettings(set=name, root=str(tmp_path)), ModelSettings("errseg-tiny"), EvalSettings(device="cpu", workers=0)
    )
    result = evaluate(settings, tmp_path / "out")
    assert result is not None and result.metrics.confusion.shape == (classes, classes)
    truth = np.concatenate([values.ravel() for values in labels.values()]).astype(np.int64)
    assert (result.metrics.true == np.bincount(truth[truth != ignore], minlength=classes)).all()
    firsts = {word.split(", ")[0] for word in find_benchmark(name).words}
    assert set(asked) == firsts and len(asked) == len(firsts)


def test_readers_are_a_processs_share_of_the_cores(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    stream = Segmenter.stream

    def spy(self: Segmenter, images: Any, *, workers: int, **options: Any) -> Any:
        asked.append(workers)
        return stream(self, images, workers=0, **options)

    monkeypatch.setattr(Segmenter, "stream", spy)
    monkeypatch.setattr("errseg.scale.processes.default_workers", lambda: 12)
    for workers in (None, 5):
        evaluate(config(scenes, workers=workers), tmp_path / str(workers), processes=Processes(local_count=4))
    assert asked == [3, 5]


def test_nothing_to_score(copy: Path, tmp_path: Path) -> None:
    for path in (copy / "labels").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(ErrSegError, match="there is no labelled pixel to score"):
        run(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": DataSettings()}, "data: give either set"),
        ({"data": DataSettings(set="ADE-150", folder="x")}, "data: give either set"),
        ({"data": DataSettings(set="ADE-150", root="nowhere")}, "ADE-150: no labelled pictures"),
        ({"model": ModelSettings("errseg-b")}, "model: errseg-b needs weights"),
        ({"eval": EvalSettings(dtype="float8", device="cpu")}, "eval: dtype: expected one of float32"),
    ],
)
def test_bad_settings_are_one_line(change: dict[str, Any], reason: str, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ErrSegError) as caught:
        evaluate(replace(config(scenes), **change), tmp_path)
    assert str(caught.value).startswith(reason)


def test_torchmetrics_is_missing(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ErrSegError, match=r"pip install 'errseg\[eval\]'"):
        run(scenes, tmp_path)


def test_two_processes_give_the_matrix_of_one(scenes: Path, expected: np.ndarray, tmp_path: Path) -> None:
    settings = "".join(f"  {line}\n" for line in ("device: cpu", "workers: 0", "batch_size: 1"))
    (tmp_path / "toy.yaml").write_text(f"data: {{folder: {scenes}}}\nmodel: {{name: errseg-tiny}}\neval:\n{settings}")
    done = torchrun("-m", "errseg", "eval", tmp_path / "toy.yaml", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 and "4 pictures, errseg-tiny" in done.stdout
    parts = sorted((tmp_path / "out/parts").iterdir())
    assert [path.name for path in parts] == [f"run0000-process000{i}.safetensors" for i in range(2)]
    assert (load_file(tmp_path / "out/confusion.safetensors")["confusion"] == expected).all()
