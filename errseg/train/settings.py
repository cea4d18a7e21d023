"""What a training configuration may say; the defaults are the published recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from errseg.configs.schema import DataSettings, ModelSettings
from errseg.errors import ErrSegError


@dataclass(frozen=True)
class TrainData(DataSettings):
    """As for evaluation, but the training part of a benchmark."""

    split: str = "train"


@dataclass(frozen=True)
class TrainSettings:
    """Steps, rates, augmentation, and what becomes of it."""

    steps: int = 80_000
    batch_size: int = 4  # pictures per step, in all processes together
    accumulate: int = 1  # parts in which a process computes its share
    lr: float = 2e-4
    clip_lr: float = 0.01  # times lr, for the towers
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    clip_norm: float | None = None
    exclude_ignored: bool = False  # ignored pixels count as negative for every class in the published loss
    drop_path: float | None = None  # of the image tower; None: the model's own
    decoder_drop_path: float | None = None  # layer i drops with i times this

    short_edge: int | None = None  # of the picture before the crop; None: the crop's
    max_edge: int = 1333
    colour_jitter: bool = True
    flip: bool = True
    bad_files: Literal["stop", "skip"] = "stop"

    seed: int = 0
    fused: bool = True  # off: the published order of operations, slow, for comparison
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    gradient_checkpointing: bool = False  # of the towers: less memory, more time
    deterministic: bool = False  # PyTorch's deterministic algorithms only
    ema: float | None = None  # decay of an average of the weights

    out: str | None = None  # errseg-train/NAME OF THE CONFIGURATION
    device: str | None = None  # cpu or cuda; None: a GPU if there is one
    workers: int | None = None  # processes that read pictures, for each training process
    log_every: int = 50
    save_every: int = 2500
    keep: int = 3  # checkpoints
    tracker: Literal["tensorboard", "none"] = "tensorboard"


@dataclass(frozen=True)
class TrainConfig:
    """`errseg train`."""

    data: TrainData
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


# These may change from one start of a run to the next: what is computed stays the same.
_FREE = {f"train.{name}" for name in ("out", "device", "workers", "log_every", "save_every", "keep", "tracker")}
_FREE |= {"train.gradient_checkpointing", "train.accumulate", "data.root", "data.folder"}
_AT_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "save_every": 1, "keep": 1}
_AT_LEAST |= {"warmup_steps": 0, "workers": 0, "max_edge": 1, "short_edge": 1, "seed": 0}
_SHARES = ("drop_path", "decoder_drop_path", "ema")


def sequence(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is computed, by dotted name."""
    settings = {
        f"{part.name}.{name}": value
        for part in fields(config)
        for name, value in asdict(getattr(config, part.name)).items()
    }
    return {name: value for name, value in settings.items() if name not in _FREE}


def check(config: TrainConfig, processes: int) -> None:
    """Raise ErrSegError for settings that no run can have."""
    train = config.train
    for name, least in _AT_LEAST.items():
        value = getattr(train, name)
        if value is not None and value < least:
            raise ErrSegError(f"train: {name}: expected at least {least}, got {value}")
    for name in ("lr", "clip_lr", "weight_decay"):
        if not getattr(train, name) >= 0:
            raise ErrSegError(f"train: {name}: expected 0 or more, got {getattr(train, name)}")
    if train.clip_norm is not None and not train.clip_norm > 0:
        raise ErrSegError(f"train: clip_norm: expected more than 0, got {train.clip_norm}")
    for name in _SHARES:
        value = getattr(train, name)
        if value is not None and not 0 <= value < 1:
            raise ErrSegError(f"train: {name}: expected 0 or more and less than 1, got {value}")
    if train.batch_size % (processes * train.accumulate):
        raise ErrSegError(
            f"train: batch_size {train.batch_size} cannot be shared by {processes} processes"
            f" with accumulate {train.accumulate}: make it a multiple of {processes * train.accumulate}"
        )
    if train.exclude_ignored and not train.fused:
        raise ErrSegError("train: exclude_ignored is no part of the published loss, which fused: false computes")
    if config.model.weights is None and config.model.name != "errseg-tiny":
        raise ErrSegError(
            f"model: {config.model.name} needs weights to start from: clip (open_clip's towers, downloaded), "
            "random, or a checkpoint"
        )
