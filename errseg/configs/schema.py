"""What a configuration may say: plain dataclasses, read from YAML with every mistake named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelSettings:
    """Which network, and how it sees pictures and words; what is None is the model's own."""

    name: str = "errseg-b"
    weights: str | None = None  # a file, a folder, or a Hugging Face user/repo
    size: int | None = None  # S: side of its square input in pixels, a multiple of 32
    num_selected: int | None = None  # K: words kept per picture
    prompt: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """A benchmark (`set`, below `root`) or a folder of one's own with images/, labels/, classes.txt."""

    set: str | None = None
    split: str = "val"
    root: str | None = None  # $ERRSEG_DATASETS, $DETECTRON2_DATASETS or ./datasets
    folder: str | None = None


@dataclass(frozen=True)
class EvalSettings:
    """How to go over the pictures, and where to."""

    out: str | None = None  # errseg-eval/NAME OF THE CONFIGURATION
    protocol: Literal["published", "direct"] = "published"  # shortest edge to 800 first, or straight to S x S
    batch_size: int | None = None
    workers: int | None = None  # threads that read pictures
    device: str | None = None
    dtype: str = "float32"
    predictions: bool = False  # write the predicted label maps too
    bad_files: Literal["stop", "skip"] = "stop"
    save_seconds: float = 30.0  # at most so much work is lost when it is killed
    published_miou: float | None = None  # shown beside the result


@dataclass(frozen=True)
class EvalConfig:
    """`errseg eval`."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
