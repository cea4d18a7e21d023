"""What the tests of training share: a folder of scenes, and an accelerate that forgets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.world import fresh_accelerate, make_folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five toy scenes of 80 x 80 pixels."""
    return make_folder(tmp_path_factory.mktemp("scenes") / "toy")


@pytest.fixture(scope="session")
def strips(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes with more and more rows that are not labelled."""
    folder = shutil.copytree(scenes, tmp_path_factory.mktemp("strips") / "toy")
    for i in range(5):
        labels = np.array(Image.open(folder / f"labels/{i}.png"))
        labels[: 15 * i] = 255
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield
