"""Seconds per stage of segmenting a picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

STAGES = ("read", "preprocess", "text", "towers", "guidance", "rrhc", "rrca", "upsampler", "labels")


class StageClock:
    """Seconds per stage; the network's own stages are timed by forward hooks while it is watched."""

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self.device = device
        decoder: Any = model.decoder
        self.watched: dict[str, Any] = {"towers": model.clip} | {
            name: getattr(decoder, name) for name in ("guidance", "rrhc", "rrca", "upsampler")
        }
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def watching(self) -> Iterator[None]:
        running: dict[str, Any] = {}

        def enter(name: str) -> None:
            running[name] = self.stage(name)
            running[name].__enter__()

        def leave(name: str) -> None:
            running.pop(name).__exit__(None, None, None)

        handles = []
        for name, module in self.watched.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            handles.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, num_pictures: int) -> dict[str, float]:
        """Each picture's share of the time since last taken."""
        shares = {name: seconds / num_pictures for name, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(STAGES, 0.0)
        return shares


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
