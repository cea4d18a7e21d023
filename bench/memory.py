"""Peak memory of a call on top of its arguments, parameters and whatever was there before.

On a GPU PyTorch's allocator knows. On a CPU new storages are counted, which sees neither scratch inside a kernel nor
what compiled code allocates; for these the resident memory of a process of its own is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from errseg.testing.memory import AllocationSpy, measure_peak_memory

# Freed blocks go back to the system at once, so that none of the set-up's is used again unseen.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_SETUP = """
import json
from errseg.bench.memory import subject
call = subject(json.loads({spec!r}))
call()
"""


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch's CUDA allocator handed out on top."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def storage_peak(call: Callable[[], Any]) -> int:
    """Bytes of new CPU storages that were alive together."""
    with AllocationSpy() as spy:
        call()
    return spy.peak_bytes


def process_peak(spec: dict[str, Any]) -> int:
    """Bytes that the resident size of a fresh process grew by in the second call; see `subject`."""
    return measure_peak_memory(_SETUP.format(spec=json.dumps(spec)), "call()", env=_ALLOCATOR).extra


def subject(spec: dict[str, Any]) -> Callable[[], Any]:
    """The call that a specification (target, case, provider, precision, tf32, passing) names, on the CPU."""
    from errseg.bench.cases import Case
    from errseg.bench.precision import Precision
    from errseg.bench.registry import find_target
    from errseg.bench.runner import Runner

    target, case = find_target(spec["target"]), Case.from_dict(spec["case"])
    runner = Runner(torch.device("cpu"), Precision(spec["precision"], spec["tf32"]))
    call: Callable[[], Any] = runner.single(target, case, spec["provider"], spec["passing"])
    return call
