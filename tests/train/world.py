"""Toy scenes as one's own folder of data, and short training configurations for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from errseg.configs import build
from errseg.data.toy import WORDS, ToyWorld
from errseg.train.settings import TrainConfig

SMALL = {
    "steps": 6,
    "batch_size": 2,
    "lr": 1e-3,
    "clip_lr": 0.1,
    "warmup_steps": 2,
    "decoder_drop_path": 0.2,
    "drop_path": 0.2,
    "device": "cpu",
    "dtype": "float32",
    "workers": 0,
    "log_every": 1,
    "save_every": 2,
    "tracker": "none",
}


def make_folder(base: Path, count: int = 5, size: int = 80) -> Path:
    """`count` scenes with images/, labels/ and classes.txt."""
    world = ToyWorld(3, size=size)
    for name in ("images", "labels"):
        (base / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(world[i].image).save(base / f"images/{i}.png")
        Image.fromarray(world[i].labels.astype(np.uint8)).save(base / f"labels/{i}.png")
    (base / "classes.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return base


def config(folder: Path, *, size: int = 64, weights: str | None = None, **settings: object) -> TrainConfig:
    """The tiny model on a folder; `settings` are those of `train`."""
    model = {"name": "errseg-tiny", "size": size, "num_selected": 8, "weights": weights}
    return build(TrainConfig, {"data": {"folder": str(folder)}, "model": model, "train": SMALL | settings}, "test")


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Let the next run choose device and precision anew: accelerate keeps them for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
