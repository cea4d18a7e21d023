"""A plain training loop on Hugging Face accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from errseg.errors import ErrSegError
from errseg.train.optim import MuonWithAdamW

if TYPE_CHECKING:
    from accelerate import Accelerator

Losses = dict[str, Tensor]


def make_accelerator(device: str | None = None) -> Accelerator:
    """An accelerator for this process in float32; ErrSegError without the package.

    `device` "cpu" keeps to the CPU, None takes the GPU if there is one.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ErrSegError("training needs the package accelerate: pip install accelerate") from error
    return Accelerator(cpu=device == "cpu", mixed_precision="no")


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
