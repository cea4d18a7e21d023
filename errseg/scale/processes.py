"""Several processes that share a list of pictures, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from errseg.data.loader import default_workers
from errseg.errors import ErrSegError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the first to finish waits for the slowest
_FAREWELL = 10.0  # seconds


@dataclass(frozen=True)
class Processes:
    """This process among `count`; `local_rank` counts on its own machine, which has `local_count` of them.

    They talk over the CPU, in `group` of torch.distributed (None: the default one).
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    group: Any = None

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        """Those that accelerate has connected, with a group of their own on the CPU; call it in all of them."""
        count = accelerator.num_processes
        if count == 1:
            return cls()
        import torch.distributed as dist

        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(accelerator.process_index, count, accelerator.local_process_index, local_count, group)

    @property
    def workers(self) -> int:
        """Readers of pictures, threads or processes, for this process: its share of the machine's cores."""
        return max(1, default_workers() // self.local_count)

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
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """All processes' values by rank, in all of them; waits for all."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values = [value] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, value: int) -> int:
        """The sum over all processes, in all of them; waits for all."""
        return self._reduced(value, "SUM")

    def any(self, flag: bool) -> bool:
        """Whether it is so in one process at least, in all of them; waits for all."""
        return bool(self._reduced(int(flag), "MAX"))

    def _reduced(self, value: int, how: str) -> int:
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        number = torch.tensor(value)
        dist.all_reduce(number, getattr(dist.ReduceOp, how), group=self.group)
        return int(number)

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
        if not self.any(problem is not None):
            return value  # type: ignore[return-value]
        first = next(line for line in self.gather(None if problem is None else str(problem)) if line is not None)
        if self.rank == 0:
            raise ErrSegError(first) from problem
        raise SystemExit(0)

    def first_of_each_machine_first(self, work: Callable[[], T]) -> T:
        """`work()` in one process of each machine, then in the others, which find there what it has downloaded.

        Raises:
            ErrSegError, SystemExit: as `all_or_none`.
        """
        turns = [self.all_or_none(work if mine else _nothing) for mine in (self.local_rank == 0, self.local_rank > 0)]
        return turns[self.local_rank > 0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier(self.group)


def _nothing() -> None:
    return None


@contextmanager
def speaking_for_the_machine() -> Iterator[None]:
    """Before processes are connected: a mistake that all of a machine make is told by its first alone.

    Raises:
        SystemExit: in the others, with 0, as in `Processes.all_or_none`.
    """
    try:
        yield
    except ErrSegError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(0) from None
        raise


def take_leave() -> None:
    """Return once all processes are about to disconnect: the first to hang up could cut short what others still hear.

    One that never comes, for a fault of its own, is waited for some seconds.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    give_up = time.monotonic() + _FAREWELL
    with suppress(RuntimeError):  # the process that keeps the store has seen all of them, and is gone
        leaving = store.add("errseg/leaving", 1)
        while leaving < dist.get_world_size() and time.monotonic() < give_up:
            time.sleep(0.01)
            leaving = store.add("errseg/leaving", 0)


@contextmanager
def leaving_in_order() -> Iterator[None]:
    """After a mistake that ends all processes: disconnect them, which otherwise may abort as they end."""
    try:
        yield
    except (ErrSegError, SystemExit):
        import torch.distributed as dist

        take_leave()
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


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
    interrupted = False
    try:
        yield Processes(dist.get_rank(), count, local_rank, local_count)
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not interrupted:
            take_leave()
        dist.destroy_process_group()
