"""Spies on what code allocates, on host synchronisation, and on the memory of a whole process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_BUILTIN_NAMESPACES = ("aten", "prims", "prim")


class _OpSpy(TorchDispatchMode):
    """Sees every dispatcher op, those inside custom ops and undecomposed composite ops included."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _BUILTIN_NAMESPACES:
            with self:
                result = func.decompose(*args, **kwargs)  # only composite ops have one
            if result is not NotImplemented:
                return result
            self.before(func, args, kwargs)
            result = func(*args, **kwargs)
        else:
            self.before(func, args, kwargs)
            with self.inside():  # calls the op's own kernel below this mode; its inner ops come back here
                result = func.redispatch(_dispatch_keys(args, kwargs), *args, **kwargs)
        self.after(func, args, kwargs, result)
        return result

    def inside(self) -> contextlib.AbstractContextManager[Any]:
        """What is active inside a custom op."""
        return self

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called ahead of each op."""

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Called behind each op."""


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def _dispatch_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch._C.DispatchKeySet:
    """The key of the device that the arguments are on."""
    device = next((tensor.device.type for tensor in _tensors(args, kwargs)), "cpu")
    names = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[device]))


@dataclass(frozen=True)
class Allocation:
    """A storage that an op made."""

    op: str
    nbytes: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op} made {self.nbytes:,} bytes, shape {list(self.shape)}"


class AllocationSpy(_OpSpy):
    """Records each new storage while it is active: what, how large, and the peak of what is alive.

    Storages that existed before do not count. Scratch inside a built-in kernel (im2col and the like) is not
    seen: `measure_peak_memory` is for that. With `limit`, an op that makes a larger storage raises
    AssertionError.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.allocations: list[Allocation] = []
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes of the recorded storages that are still alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    @property
    def largest(self) -> Allocation | None:
        """The largest single allocation, None when there was none."""
        return max(self.allocations, key=lambda allocation: allocation.nbytes, default=None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all allocations together, freed ones included."""
        return sum(allocation.nbytes for allocation in self.allocations)

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in _tensors(args, kwargs)}
        live = self.live_bytes
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._alive:
                live += self._record(Allocation(str(func), storage.nbytes(), tuple(tensor.shape)), storage)
        self.peak_bytes = max(self.peak_bytes, live)

    def _record(self, allocation: Allocation, storage: torch.UntypedStorage) -> int:
        self.allocations.append(allocation)
        self._alive[storage._cdata] = (StorageWeakRef(storage), allocation.nbytes)
        if self.limit is not None and allocation.nbytes > self.limit:
            raise AssertionError(f"{allocation}; allowed {self.limit:,} at once")
        return allocation.nbytes


def assert_no_allocation_larger_than(nbytes: int) -> AllocationSpy:
    """A context in which an op that makes a storage of more than `nbytes` raises AssertionError."""
    return AllocationSpy(limit=nbytes)


_SYNCING_OPS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"}
_SYNCING_METHODS: dict[Any, str] = {
    getattr(Tensor, name): f"Tensor.{name}" for name in ("tolist", "item", "numpy", "cpu", "__array__")
}


def _sync_reason(func: Any, args: tuple[Any, ...]) -> str | None:
    """Why an op would make the host wait for a GPU, None when it would not."""
    packet = func.overloadpacket.__name__ if func.namespace in _BUILTIN_NAMESPACES else ""
    if packet in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        masks = [t for t in _tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
        fills = packet != "index" and args[2].numel() == 1  # a masked fill in disguise
        return "a boolean index has a size that only the device knows" if masks and not fills else None
    if packet in _SYNCING_OPS or torch.Tag.data_dependent_output in func.tags:
        return "its value goes to the host"
    if torch.Tag.dynamic_output_shape in func.tags and packet != "nonzero_static":
        return "its size is known to the device only"
    return None


class _SyncingOps(_OpSpy):
    def __init__(self, methods: TorchFunctionMode) -> None:
        super().__init__()
        self.methods = methods

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self.methods, self:
            yield

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if reason := _sync_reason(func, args):
            raise AssertionError(f"host sync: {func}: {reason}")
        on_device = any(tensor.device.type == "cuda" for tensor in _tensors(args))
        if on_device and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            raise AssertionError(f"host sync: {func}: copies to the host")


class _SyncingMethods(TorchFunctionMode):
    """Catches what leaves no dispatcher op on a CPU tensor: tolist(), numpy(), cpu()."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SYNCING_METHODS:
            raise AssertionError(f"host sync: {_SYNCING_METHODS[func]}()")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbid_host_syncs() -> Iterator[None]:
    """A context in which what would make the host wait for a GPU raises AssertionError, on CPU tensors too.

    That is item(), bool(tensor), nonzero, boolean indexing, unique, tolist() and the like; with CUDA in use
    PyTorch's own check is switched on as well.
    """
    methods = _SyncingMethods()
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    try:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("error")
        with methods, _SyncingOps(methods):
            yield
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode(before)


def _status_bytes(field: str) -> int | None:
    """A kB entry of /proc/self/status in bytes, None where there is none (not Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_rss() -> int:
    """Bytes: the largest resident size of this process so far, or since `reset_peak_rss`."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_rss() -> int:
    """Bytes resident now (the peak, where the system does not tell)."""
    return _status_bytes("VmRSS") or peak_rss()


def reset_peak_rss() -> bool:
    """Starts the peak afresh at the present size; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process of its own, in bytes."""

    baseline: int  # after the set-up
    peak: int  # while the body ran
    exact: bool  # False: the peak may be that of the set-up (an upper bound)
    stdout: str

    @property
    def extra(self) -> int:
        """What the body needed on top of the set-up."""
        return max(self.peak - self.baseline, 0)


_MEASURED = """
import json, sys
from errseg.testing import memory
space = {"__name__": "__main__"}
exec(compile(sys.argv[1], "<setup>", "exec"), space)
baseline, exact = memory.current_rss(), memory.reset_peak_rss()
exec(compile(sys.argv[2], "<body>", "exec"), space)
print(file=sys.stdout, flush=True)
print(json.dumps({"baseline": baseline, "peak": memory.peak_rss(), "exact": exact}))
"""


def measure_peak_memory(
    setup: str, body: str, *, env: dict[str, str] | None = None, timeout: float = 600.0
) -> PeakMemory:
    """Runs two pieces of Python in one fresh interpreter and measures the resident memory of the second.

    Raises AssertionError with the process's error output when it fails, TimeoutExpired after `timeout` s.
    """
    command = [sys.executable, "-c", _MEASURED, setup, body]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    variables = {**os.environ, "PYTHONPATH": path, **(env or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise AssertionError(f"the measured process ended with {done.returncode}:\n{done.stderr}")
    stdout, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return PeakMemory(**json.loads(last), stdout=stdout.rstrip("\n"))


def _poisoning(allocate: Any) -> Any:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """A context in which new memory holds NaN or the largest integer, so that an unwritten tail is seen.

    Covers torch.empty and its kin in Python; what PyTorch's operators and libraries allocate is poisoned through
    PyTorch's deterministic mode, which only warns of operators that have no deterministic form.
    """
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    patches: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    patches += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        for owner, name in patches:
            stack.enter_context(patch.object(owner, name, _poisoning(getattr(owner, name))))
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
