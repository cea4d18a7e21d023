"""Muon for the matrices, AdamW for the rest, one learning-rate curve for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Schedule = Callable[[int], float]

_EMBEDDINGS = ("token_embedding", "positional_embedding", "text_projection")


@dataclass(frozen=True)
class Group:
    """Parameters that follow one schedule: `schedule(step)` multiplies both learning rates."""

    parameters: Iterable[tuple[str, nn.Parameter]]
    schedule: Schedule
    muon_lr: float
    adamw_lr: float


class MuonWithAdamW:
    """Two PyTorch optimizers that step together.

    `torch.optim.Muon` updates every 2-D weight except embeddings and the text projection, `torch.optim.AdamW`
    everything else; vectors and scalars are not decayed.
    """

    def __init__(self, groups: Iterable[Group], *, weight_decay: float, betas: tuple[float, float]) -> None:
        muon_groups: list[dict[str, Any]] = []
        adamw_groups: list[dict[str, Any]] = []
        for group in groups:
            parameters = [(name, p) for name, p in group.parameters if p.requires_grad]
            matrices = [p for name, p in parameters if _is_matrix(name, p)]
            tensors = [p for name, p in parameters if not _is_matrix(name, p) and p.ndim >= 2]
            vectors = [p for _, p in parameters if p.ndim < 2]
            for target, members, lr, decay in (
                (muon_groups, matrices, group.muon_lr, weight_decay),
                (adamw_groups, tensors, group.adamw_lr, weight_decay),
                (adamw_groups, vectors, group.adamw_lr, 0.0),
            ):
                if members:
                    entry = {"params": members, "lr": lr, "weight_decay": decay}
                    target.append(entry | {"peak_lr": lr, "schedule": group.schedule})
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon_groups:
            self.optimizers.append(torch.optim.Muon(muon_groups, momentum=0.95, nesterov=True, adjust_lr_fn="original"))
        if adamw_groups:
            self.optimizers.append(torch.optim.AdamW(adamw_groups, betas=betas))

    def step(self, step: int) -> None:
        """Set every group's rate for this step (counted from 0), update, and drop the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * group["schedule"](step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(word in name for word in _EMBEDDINGS)


def trapezoid(start: int, total: int, *, warmup: int, decay: int) -> Schedule:
    """0 before `start`, up to 1 over `warmup` steps, and linearly to 0 over the last `decay` of `total`."""

    def factor(step: int) -> float:
        if step < start:
            return 0.0
        return min((step - start + 1) / max(warmup, 1), (total - step) / max(decay, 1), 1.0)

    return factor
