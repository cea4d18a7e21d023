"""What a person may ask of a `Segmenter`, checked: one line for what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch
from torch import nn

from errseg.errors import ErrSegError
from errseg.model.errseg import ERRSeg, create_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PUBLISHED_WEIGHTS = "lchen1019/ERR-Seg"

# The benchmarks' K for their vocabulary sizes PAS-20, PC-59, COCO-171 and A-150; more words get 48.
_NUM_SELECTED = ((20, 16), (59, 24), (171, 32))
_MOST_SELECTED = 48


def default_num_selected(num_words: int) -> int:
    """K for a vocabulary: 16 up to 20 words, 24 up to 59, 32 up to 171, else 48 (the benchmarks' values)."""
    return next((k for most, k in _NUM_SELECTED if num_words <= most), _MOST_SELECTED)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that have it, float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def check_options(
    threshold: float | None, protocol: str | None, batch_size: int | None, workers: int | None = None
) -> None:
    """Raise ErrSegError for options of a call that are wrong for any picture."""
    if protocol not in (None, "published"):
        raise ErrSegError(f"protocol: expected 'published' or nothing, got {protocol!r}")
    if batch_size is not None and batch_size < 1:
        raise ErrSegError(f"batch size: expected at least 1, got {batch_size}")
    if workers is not None and workers < 0:
        raise ErrSegError(f"workers: expected 0 or more, got {workers}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ErrSegError(f"threshold: expected a probability from 0 to 1, got {threshold}")


def find_model(model: str | ERRSeg, weights: str | PathLike[str] | None) -> ERRSeg:
    if not isinstance(model, str):
        if weights is not None:
            raise ErrSegError("weights go with a model's name; this model brings its own")
        return model
    if weights is None and model != "errseg-tiny":
        warnings.warn(
            f"{model} with random weights: give weights= (published: {PUBLISHED_WEIGHTS} at Hugging Face)",
            stacklevel=3,
        )
    return create_model(model, weights)


def find_device(device: str | torch.device | None, model: str | nn.Module) -> torch.device:
    if device is None:
        if not isinstance(model, str):
            return next(model.parameters()).device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ErrSegError(f"no such device: {device!r}; try cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        reason = "no usable GPU" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
        raise ErrSegError(f"no such device: {device} ({reason}); use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ErrSegError(f"no such device: {device}; there are {torch.cuda.device_count()} GPUs, from cuda:0")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ErrSegError(f"no such device: {device}; try cpu or cuda") from error
    return found


def check_num_selected(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ErrSegError(f"num_selected: expected at least 1, got {value}")
    return value


def check_size(value: int) -> int:
    if value < 32 or value % 32:
        raise ErrSegError(f"size: expected a positive multiple of 32, got {value}")
    return value


def check_prompt(value: str) -> str:
    if value.count("{}") != 1:
        raise ErrSegError(f"prompt: expected a sentence with one {{}} for the word, got {value!r}")
    return value


@contextmanager
def memory_advice(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a line that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ErrSegError(_advice(device)) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise ErrSegError(_advice(device)) from error
        raise


def _advice(device: torch.device) -> str:
    return (
        f"out of memory on {device}: use a smaller batch size, a smaller size, fewer selected words, "
        "dtype bfloat16 or another device"
    )
