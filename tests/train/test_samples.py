"""The sequence of samples: a function of seed and position, shared out to processes, with bad files named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from errseg.data.datasets import open_folder
from errseg.train.augment import Augmentation
from errseg.train.samples import Batch, Positions, TrainingSamples, make_loader

AUGMENTATION = Augmentation(64, short_edge=72, max_edge=1333, colour_jitter=True, flip=True)


def samples(folder: Path, *, seed: int = 0, skip: bool = False) -> TrainingSamples:
    return TrainingSamples(open_folder(folder), AUGMENTATION, seed=seed, skip=skip)


def batches(data: TrainingSamples, start: int = 0, workers: int = 0, rank: int = 0, count: int = 1) -> list[Batch]:
    positions = Positions(start, 4, batch_size=4, parts=2, rank=rank, count=count)
    return list(make_loader(data, positions, workers=workers, pin=False))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in pairs)


def test_every_round_shows_every_picture_once_in_another_order(scenes: Path) -> None:
    data = samples(scenes)
    rounds = [[data._index(5 * number + i, 0) for i in range(5)] for number in range(4)]
    assert all(sorted(order) == list(range(5)) for order in rounds) and len({*map(tuple, rounds)}) > 1
    other = samples(scenes, seed=1)
    assert [other._index(i, 0) for i in range(20)] != [data._index(i, 0) for i in range(20)]


def test_samples_depend_on_the_position_alone(scenes: Path) -> None:
    data = samples(scenes)
    all_of_it = batches(data)
    before = torch.get_rng_state()
    assert equal(batches(samples(scenes), start=2), all_of_it[4:])
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(batches(data, workers=2), all_of_it)
    # Position 0 and 5 show the same five pictures in turn, never with the same random numbers.
    assert not torch.equal(all_of_it[0].images[0], all_of_it[0].images[1])


def test_two_processes_share_the_batches_of_one(scenes: Path) -> None:
    data = samples(scenes)
    for whole, *halves in zip(batches(data), batches(data, count=2), batches(data, rank=1, count=2), strict=True):
        assert torch.equal(torch.cat([half.images for half in halves]), whole.images)
        assert torch.equal(torch.cat([half.targets for half in halves]), whole.targets)


def truncate(folder: Path) -> Path:
    path = folder / "images/2.png"
    path.write_bytes(path.read_bytes()[:2000])
    return path


def remove_label(folder: Path) -> Path:
    path = folder / "labels/2.png"
    path.unlink()
    return path


def label_out_of_range(folder: Path) -> Path:
    path = folder / "labels/2.png"
    Image.fromarray(np.full((80, 80), 168, np.uint8)).save(path)
    return path


def label_of_another_size(folder: Path) -> Path:
    path = folder / "labels/2.png"
    Image.fromarray(np.zeros((80, 81), np.uint8)).save(path)
    return path


def fewer_classes(folder: Path) -> Path:
    (folder / "classes.txt").write_text("grass\nsand\n")
    return folder / "labels/2.png"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "picture"),
        (remove_label, "no such file"),
        (label_out_of_range, "label 168 is out of range (classes 0 to 167, ignored 255)"),
        (label_of_another_size, "80 x 81 pixels, its picture 80 x 80"),
    ],
)
def test_a_bad_file_stops_or_is_skipped(
    spoil: Callable[[Path], Path], reason: str, scenes: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(scenes, tmp_path / "toy")
    found = open_folder(folder)  # before the label goes
    path = spoil(folder)
    stopping = TrainingSamples(found, AUGMENTATION, seed=0, skip=False)
    fatal = [batch.fatal for batch in batches(stopping) if batch.fatal is not None]
    assert fatal and all(line.startswith(f"{path}: ") and reason in line for line in fatal)
    skipping = TrainingSamples(found, AUGMENTATION, seed=0, skip=True)
    got = batches(skipping)
    assert not any(batch.fatal for batch in got) and all(len(batch.images) == 2 for batch in got)
    assert {line for batch in got for line in batch.skipped} == {fatal[0]}
    assert equal(batches(skipping, workers=1), got)


def test_fewer_classes_than_labels_are_named(scenes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scenes, tmp_path / "toy")
    fewer_classes(folder)
    lines = [batch.fatal or "" for batch in batches(samples(folder))]
    assert all(
        "is out of range (classes 0 to 1, ignored 255)" in line and str(folder / "labels") in line for line in lines
    )


def test_when_nothing_can_be_read_skipping_ends(scenes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scenes, tmp_path / "toy")
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    batch = batches(samples(folder, skip=True))[0]
    assert batch.fatal is not None and "20 files in a row" in batch.fatal and str(folder / "images") in batch.fatal
