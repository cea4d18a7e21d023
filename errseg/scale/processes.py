"""Several processes that share a list of pictures, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from errseg.errors import ErrSegError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the first to finish waits for the slowest


@dataclass(frozen=True)
class Processes:
    """This process among `count`; `local_rank` counts on its own machine, which has `local_count` of them."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list that all have in the same order."""
        return items[self.rank :: self.count]

    def device(self, name: str | None) -> str | None:
        """This process's own GPU where the name asks for any; otherwise the name."""
        import torch

        if self.count > 1 and name in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def agree(self, value: T) -> T:
        """The first process's value, in all of them; waits for all."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """All processes' values by rank, in all of them; waits for all."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def all_or_none(self, work: Callable[[], T]) -> T:
        """This process's `work()`, once it is done in all of them; where it fails in one, all stop.

        Raises:
            ErrSegError: of the lowest rank that has one, in the first process.
            SystemExit: in the others, with 0: the first speaks for all, and torchrun ends the rest on a worse code.
        """
        if self.count == 1:
            return work()
        value, problem = None, None
        try:
            value = work()
        except ErrSegError as error:
            problem = error
        first = next((line for line in self.gather(None if problem is None else str(problem)) if line), None)
        if first is None:
            return value  # type: ignore[return-value]
        if self.rank == 0:
            raise ErrSegError(first) from problem
        raise SystemExit(0)

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
    local_rank, local_count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        yield Processes(dist.get_rank(), count, local_rank, local_count)
    finally:
        dist.destroy_process_group()
