"""Several processes that share an evaluation, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the first to finish waits for the slowest


@dataclass(frozen=True)
class Processes:
    """This process among `count`; `local_rank` counts on its own machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list that all have in the same order."""
        return items[self.rank :: self.count]

    def agree(self, value: T) -> T:
        """The first process's value, in all of them; waits for all."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torchrun's environment, connected; this one alone without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    import torch.distributed as dist

    # Only names and numbers travel, so the CPU's backend serves on GPUs too.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
