"""A plain training loop on Hugging Face accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.train.optim import MuonWithAdamW

if TYPE_CHECKING:
    from accelerate import Accelerator

Losses = dict[str, Tensor]


_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def make_accelerator(
    device: str | None = None,
    *,
    dtype: str = "float32",
    accumulate: int = 1,
    folder: Path | None = None,
    tracker: str | None = None,
) -> Accelerator:
    """An accelerator for this process, joined to the others of torchrun.

    Args:
        device: "cpu" keeps to the CPU, "cuda" wants a GPU, None takes one if there is one.
        dtype: what autocast computes in: "float32" (no autocast), "bfloat16", or "float16" with a gradient scaler.
        accumulate: backward passes per update.
        folder: where the tracker writes.
        tracker: "tensorboard" or None.

    Raises:
        ErrSegError: a package is missing, or the device, or float16 on a CPU.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import is_tensorboard_available
    except ImportError as error:
        raise ErrSegError("training needs the package accelerate: pip install accelerate") from error
    if device not in (None, "cpu", "cuda"):
        raise ErrSegError(f"device: expected cpu or cuda, got {device!r} (CUDA_VISIBLE_DEVICES chooses among GPUs)")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        raise ErrSegError("no such device: cuda (no usable GPU); use cpu")
    if dtype == "float16" and not on_gpu:
        raise ErrSegError("training in float16 needs a GPU: choose bfloat16 or float32")
    if tracker == "tensorboard" and not is_tensorboard_available():
        raise ErrSegError("tracking needs the package tensorboardX or tensorboard: pip install 'errseg[train]'")
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=_PRECISIONS[dtype],
        gradient_accumulation_steps=accumulate,
        step_scheduler_with_optimizer=False,
        log_with=tracker,
        project_dir=folder,
    )


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: MuonWithAdamW,
    steps: int,
    losses_at: Callable[[int], Losses],
    *,
    clip_norm: float,
) -> Iterator[tuple[int, Losses]]:
    """Train for `steps` steps, yielding (step, losses) after each.

    `losses_at(step)` draws a batch and returns named losses; their sum is minimised. The yielded losses are
    detached and still on the device.
    """
    model.train()
    optimizer.optimizers = [accelerator.prepare(o) for o in optimizer.optimizers]
    for step in range(steps):
        losses = losses_at(step)
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step(step)
        yield step, {name: loss.detach() for name, loss in losses.items()}
