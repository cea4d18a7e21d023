"""On a GPU: every backend's forward pass can be captured in a CUDA graph, and a replay gives what a call gives."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.testing.samples import Sizes, map_tensors, sample

SIZES = Sizes(batch=2, classes=16, words=300, height=20, width=24, channels=128, heads=4, hidden=384, text=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROOMS = ops.OPS.items() if torch.cuda.is_available() else ()
CASES = [(op, backend) for op, rooms in ROOMS for backend in rooms.backends if backend != "cpu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_a_replayed_graph_gives_what_a_call_gives(op: str, backend: str, dtype: str) -> None:
    call = sample(op, SIZES).to(DTYPES[dtype]).map(lambda tensor: tensor.cuda())
    reason = ops.OPS[op].why_not(backend, *call.raw_arguments())
    if reason is not None:
        pytest.skip(f"{op} on {backend}: {reason}")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        wanted = map_tensors(call(backend=backend), torch.clone)
        with torch.cuda.stream(side):
            call(backend=backend)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = call(backend=backend)
    map_tensors(captured, lambda tensor: tensor.zero_())
    graph.replay()
    torch.cuda.synchronize()
    pairs = zip(results(captured), results(wanted), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


def results(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]
