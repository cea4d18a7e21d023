"""What the tests of many processors share: pictures, one of them damaged, and the label maps of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errseg.segmenter import Segmenter
from tests.scale.world import WORDS


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    for i, name in enumerate(("a.png", "x/a.png", "x/b.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:700])
    return folder


@pytest.fixture(scope="session")
def expected(photos: Path) -> dict[str, np.ndarray]:
    segmenter = Segmenter("errseg-tiny", vocabulary=WORDS, device="cpu")
    return {name: segmenter(photos / f"{name}.png").labels.numpy() for name in ("a", "x/a", "x/b")}
