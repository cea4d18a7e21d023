"""Ray Data on a local instance: label maps written whole, failed pictures collected, one line for a mistake."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from errseg.data.labels import load_labels
from errseg.errors import ErrSegError
from errseg.scale import segment_dataset, segment_rows
from errseg.scale.actor import Job, PictureActor
from errseg.scale.dataset import collect, list_pictures
from errseg.vocabulary import Vocabulary
from tests.launch import ROOT
from tests.scale.world import WORDS, agree

TINY: dict[str, Any] = {"model": "errseg-tiny", "vocabulary": WORDS}
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'errseg[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray that leaves nothing behind: its token would go to the home directory, its logs stay."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # short: there is a limit to the names of sockets
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        start_ray(folder)
        yield
    finally:
        ray.shutdown()
        del os.environ["RAY_AUTH_TOKEN"]
        shutil.rmtree(folder, ignore_errors=True)


def start_ray(folder: str, tries: int = 3) -> None:
    """Ray gives its processes half a minute to start, which a busy machine may not have left over."""
    import ray

    for left in reversed(range(tries)):
        try:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=100 << 20,
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
                _temp_dir=folder,
            )
            return
        except Exception as error:
            if not left or "timed out" not in str(error):
                raise
            ray.shutdown()


@needs_ray
def test_label_maps_of_a_folder(photos: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "out"
    items = list_pictures(photos)
    task = {name: [item[name] for item in items] for name in ("path", "output")}
    summary = collect(SimpleNamespace(iter_rows=PictureActor(job(out=str(out), format="png"))(task).to_pylist))
    assert summary.pictures == 3
    ((path, line),) = summary.failures.items()
    assert path == str(photos / "cut.png") and line.startswith(path) and "\n" not in line
    written = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    assert written == sorted(name + ending for name in expected for ending in (".json", ".labels.png"))
    for name, labels in expected.items():
        assert agree(load_labels(out / f"{name}.labels.png"), labels)


@needs_ray
def test_parquet_of_a_dataset(photos: Path, expected: dict[str, np.ndarray], cluster: None, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    import ray.data

    out = tmp_path / "out"
    pictures = ray.data.read_binary_files(str(photos), include_paths=True)
    summary = segment_dataset(pictures, out=out, concurrency=1, per_task=2, **TINY)
    assert summary.pictures == 3 and list(summary.failures) == [str(photos / "cut.png")]
    assert summary.images_per_second == pytest.approx(3 / summary.seconds)
    assert segment_rows(photos, **TINY).input_files() == []  # a folder is a list of paths; nothing runs yet
    files = sorted(out.iterdir())
    assert len(files) == 2 and all(file.suffix == ".parquet" for file in files)
    rows = {row["path"]: row for file in files for row in pq.read_table(file).to_pylist()}
    assert len(rows) == 4
    cut = rows.pop(str(photos / "cut.png"))
    assert cut["error"] == summary.failures[cut["path"]] and cut["labels"] is None and cut["areas"] is None
    for name, labels in expected.items():
        row = rows[str(photos / f"{name}.png")]
        assert row["error"] is None and (row["height"], row["width"]) == labels.shape
        assert agree(load_labels(io.BytesIO(row["labels"])), labels)
        assert {area["word"] for area in row["areas"]} <= set(WORDS)
        assert sum(area["pixels"] for area in row["areas"]) == labels.size
    with pytest.raises(ErrSegError, match="holds Parquet files already"):
        segment_dataset(photos, out=out, **TINY)
    again = segment_dataset(pictures, out=out, concurrency=1, per_task=4, resume=True, **TINY)
    assert (again.pictures, again.kept, list(again.failures)) == (0, 3, [str(photos / "cut.png")])


def job(**changes: Any) -> Job:
    call = {"background": (), "threshold": None, "protocol": None, "batch_size": 2, "workers": 1}
    return replace(Job("errseg-tiny", None, Vocabulary(WORDS), "cpu", call=call), **changes)


@needs_ray
def test_pictures_of_every_kind(photos: Path, expected: dict[str, np.ndarray]) -> None:
    files = [photos / "a.png", photos / "cut.png", photos / "gone.png", photos / "x/b.png"]
    actor = PictureActor(job())
    paths = [str(file) for file in files]
    pixels = [np.asarray(Image.open(photos / name)) for name in ("a.png", "x/b.png")]
    damaged = [b"", files[1].read_bytes()]
    tasks = (
        {"path": paths},
        {"path": paths, "bytes": [files[0].read_bytes(), *damaged, files[3].read_bytes()]},
        {"path": paths, "image": [pixels[0], pixels[0][..., 0], pixels[0].astype(np.float32), pixels[1]]},
    )
    for task in tasks:
        rows = actor(task).to_pylist()
        assert [row["path"] for row in rows] == paths
        assert [row["error"] is None for row in rows] == [True, False, False, True]
        assert all(row["error"].startswith(row["path"]) and row["labels"] is None for row in rows[1:3])
        for row, name in ((rows[0], "a"), (rows[3], "x/b")):
            assert agree(load_labels(io.BytesIO(row["labels"])), expected[name])


@needs_ray
def test_names_of_a_dataset_stay_in_the_folder(photos: Path, tmp_path: Path) -> None:
    actor = PictureActor(job(out=str(tmp_path), format="png", overlay=True))
    data = [(photos / "a.png").read_bytes()] * 2
    rows = actor({"path": ["s3://bucket/a.png", "/../../b.png"], "bytes": data}).to_pylist()
    assert [row["file"] for row in rows] == [str(tmp_path / f"{name}.labels.png") for name in ("bucket/a.png", "b.png")]
    endings = (".json", ".labels.png", ".overlay.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.png" + ending for ending in endings] + ["bucket"]
    assert json.loads((tmp_path / "b.png.json").read_text())["labels"] == "b.png.labels.png"


@needs_ray
def test_a_repeated_task_writes_the_same_file(photos: Path, tmp_path: Path) -> None:
    actor = PictureActor(job(out=str(tmp_path)))
    first, again = (actor({"path": [str(photos / "a.png")]}).to_pylist() for _ in range(2))
    assert first == again and [str(file) for file in tmp_path.iterdir()] == [first[0]["file"]]


@needs_ray
@pytest.mark.parametrize("format", ["png", "parquet"])
def test_resuming_leaves_what_is_finished(format: str, photos: Path, tmp_path: Path) -> None:
    paths = [str(photos / name) for name in ("a.png", "cut.png", "x/b.png")]
    task = {"path": paths, "bytes": [Path(path).read_bytes() for path in paths]}
    settings = {"out": str(tmp_path), "format": format, "resume": True}
    first = PictureActor(job(**settings))({name: values[:2] for name, values in task.items()})
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    second = PictureActor(job(**settings))(task)
    summary = collect(SimpleNamespace(iter_rows=second.to_pylist))
    assert [row["kept"] for row in first.to_pylist()] == [None, None]
    assert (summary.pictures, summary.kept, list(summary.failures)) == (1, 1, [paths[1]])
    assert all(file.stat().st_mtime_ns == before[file] for file in before if file.is_file())
    third = PictureActor(job(**settings))({"path": [paths[0], paths[2]]})  # nothing to read
    assert collect(SimpleNamespace(iter_rows=third.to_pylist)).kept == 2
    other = PictureActor(job(vocabulary=Vocabulary(WORDS[::-1]), **settings))({name: v[:1] for name, v in task.items()})
    (row,) = other.to_pylist()
    if format == "png":
        assert row["kept"] is None and row["file"].endswith("a.png.labels.png")
    else:
        assert row["fatal"].endswith(".parquet holds label maps for other words: choose another folder")
        file = next(tmp_path.glob("*.parquet"))
        file.write_bytes(file.read_bytes()[:100])
        (row,) = PictureActor(job(**settings))({"path": paths[:1]}).to_pylist()
        assert row["fatal"].startswith(f"{file}: unreadable (") and "\n" not in row["fatal"]


@needs_ray
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights": "gone.pth"}, "gone.pth"),
        ({"vocabulary": Vocabulary(["zebra"])}, "it knows only the words"),
        ({"out": "in the way/out"}, "cannot write"),
    ],
)
def test_what_stops_all_is_told_in_one_line(
    change: dict[str, Any], line: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in the way").write_text("")
    task = {"path": [str(photos / "a.png")]}
    written = PictureActor(job(**{"out": str(tmp_path / "out"), **change}))(task)
    with pytest.raises(ErrSegError, match=line):
        collect(SimpleNamespace(iter_rows=written.to_pylist))
    if "out" not in change:
        with pytest.raises(ErrSegError, match=line):
            PictureActor(job(**change))(task)


@needs_ray
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"format": "tiff"}, "format: expected one of parquet, png, got 'tiff'"),
        ({"overlay": True}, "overlay: goes with"),
        ({"vocabulary": []}, "the vocabulary is empty"),
        ({"vocabulary": "gone.safetensors"}, "gone.safetensors"),
        ({"model": "errseg-b"}, "errseg-b needs weights"),
        ({"per_task": 0}, "per_task: expected"),
        ({"threshold": 2}, "threshold: expected"),
        ({"size": 100}, "size: expected"),
        ({"prompt": "no"}, "prompt: expected"),
        ({"num_selected": 0}, "num_selected: expected"),
        ({"concurrency": 0}, "concurrency: expected"),
        ({"concurrency": (2, 1)}, "concurrency: expected"),
        ({"pictures": "s3://bucket/a.png"}, "read_binary_files"),
        ({"pictures": []}, "no pictures in"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    settings: dict[str, Any], line: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ErrSegError) as caught:
        segment_dataset(**{"pictures": photos, "out": tmp_path / "out", **TINY, **settings})
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ray_is_missing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ErrSegError, match=r"^this needs Ray Data \(.*\): pip install 'errseg\[ray\]'$"):
        segment_rows(photos, **TINY)
