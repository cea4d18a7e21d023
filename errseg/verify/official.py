"""This project against the published code itself: the same random weights and inputs in both."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from errseg.errors import ErrSegError
from errseg.verify.checkout import OfficialCode, load_official
from errseg.verify.checks import Check
from errseg.verify.official_accelerate import AcceleratedPair
from errseg.verify.official_decoder import DecoderPair
from errseg.verify.official_model import ModelPair
from errseg.verify.official_settings import PUBLISHED, SMALL, SMALL_MLP_HEAD, SMALL_SQUARE, Setting
from errseg.verify.room import free_gigabytes
from errseg.verify.rows import Row, Task, dtype_name

Compare = Callable[[torch.dtype], list[Check]]

DTYPES = (torch.float64, torch.float32)
# Per comparison how it is made on a setting, and the small settings; the real ones come from PUBLISHED.
COMPARISONS: dict[str, tuple[Callable[[OfficialCode, Setting, torch.device], Compare], tuple[Setting, ...]]] = {
    "decoder, evaluation": (lambda *on: DecoderPair(*on).compare_evaluation, (SMALL, SMALL_SQUARE)),
    "decoder, training": (lambda *on: DecoderPair(*on).compare_training, (SMALL, SMALL_SQUARE)),
    "image tower": (lambda *on: ModelPair(*on).compare_image_tower, (SMALL, SMALL_MLP_HEAD)),
    "text tower": (lambda *on: ModelPair(*on).compare_text_tower, (SMALL,)),
    "whole model": (lambda *on: ModelPair(*on).compare_whole_model, (SMALL,)),
    "accelerate, training": (lambda *on: AcceleratedPair(*on).compare_training, (SMALL,)),
    "accelerate, evaluation": (lambda *on: AcceleratedPair(*on).compare_evaluation, (SMALL,)),
}


def official_tasks(checkout: Path, device: torch.device, quick: bool) -> list[Task]:
    """One task per comparison and setting, in float64 and float32; `quick` leaves out the published sizes."""
    code = load_official(checkout)
    tasks: list[Task] = []
    for what, (make, small) in COMPARISONS.items():
        for setting in (*small, *(() if quick else PUBLISHED.get(what, ()))):
            case = f"{what}: {setting.name}"
            tasks.append((case, partial(_compare, case, partial(make, code, setting, device), setting, device)))
    return tasks


def _compare(case: str, make: Callable[[], Compare], setting: Setting, device: torch.device) -> list[Row]:
    compare = make()
    rows = [Row("official", "default", dtype_name(dtype), case, device=device.type) for dtype in DTYPES]
    return [_run(row, partial(compare, dtype), setting, device) for row, dtype in zip(rows, DTYPES, strict=True)]


def _run(row: Row, call: Callable[[], list[Check]], setting: Setting, device: torch.device) -> Row:
    gc.collect()
    started, free = time.perf_counter(), free_gigabytes(device)
    # Float32 rows need float64 too: it is what both are measured against.
    if setting.gigabytes > 0.85 * free:
        return replace(row, reason=f"needs {setting.gigabytes:.1f} GB, {free:.1f} GB are free")
    try:
        row = replace(row, checks=tuple(call()))
    except Exception as error:  # whatever either side raises ends the row, not the run
        text = " ".join(str(error).split())
        reason = text if isinstance(error, ErrSegError) else f"{type(error).__name__}: {text}"[:300]
        row = replace(row, reason=reason, crashed=True)
    return replace(row, seconds=time.perf_counter() - started)
