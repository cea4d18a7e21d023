"""What the tests of training share: a folder of scenes, and an accelerate that forgets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.world import fresh_accelerate, make_folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five toy scenes of 80 x 80 pixels."""
    return make_folder(tmp_path_factory.mktemp("scenes") / "toy")


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield
