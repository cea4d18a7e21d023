"""Spatial attention in Triton: compilation, views, empty batches, what is saved and what is written."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import pytest
import torch

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, poisoned_memory
from errseg.testing.samples import Sample, Sizes, sample

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
SMALL = Sizes(batch=1, classes=2, height=3, width=4)


def made(sizes: Sizes, dtype: torch.dtype = torch.float32, drop_path: bool = True) -> Sample:
    return sample("spatial_attention", sizes, drop_path=drop_path).to(dtype).map(lambda t: t.to(DEVICE))


def raw(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    arguments = made(sizes, dtype).raw_arguments()
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize("height", [3, 4])
def test_opcheck(height: int) -> None:
    names = [a.name for a in ops.OPS["spatial_attention"].overload._schema.arguments]
    arguments = zip(names, raw(Sizes(batch=1, classes=2, height=height, width=4)), strict=False)
    differentiable = ops.OPS["spatial_attention"].differentiable
    arguments = [a.requires_grad_() if n in differentiable else a for n, a in arguments]  # type: ignore[union-attr]
    torch.library.opcheck(ops.OPS["spatial_attention"].overload, (*arguments, "triton"))


def test_compiles_to_one_graph_with_its_gradient() -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()  # so that the compiler meets the question, not the answer
    call = made(SMALL)

    def result(x: torch.Tensor) -> torch.Tensor:
        return Sample(call.function, (x, *call.args[1:]), call.kwargs)(backend="triton")

    runs = []
    for function in (result, torch.compile(result, fullgraph=True, backend="aot_eager")):
        x = call.args[0].clone().requires_grad_()
        out = function(x)
        out.square().sum().backward()
        runs.append((out, x.grad))
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_views_and_empty_batches() -> None:
    call = made(SMALL)
    viewed = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    torch.testing.assert_close(viewed(backend="triton"), call(backend="triton"), rtol=0, atol=0)
    empty = made(Sizes(batch=0))
    x = empty.args[0].requires_grad_()
    result = empty(backend="triton")
    assert result.shape == x.shape
    result.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_equal_runs_give_equal_bits() -> None:
    call, grads = made(Sizes(batch=1, classes=3, height=5, width=4)), []
    for _ in range(2):
        leaves = [leaf.clone().requires_grad_() for leaf in call.leaves()]
        with poisoned_memory():
            grads.append(
                torch.autograd.grad(call.with_leaves(iter(leaves))(backend="triton").sum(), leaves, allow_unused=True)
            )
    for first, second in zip(*grads, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@pytest.mark.parametrize("training", [False, True])
def test_keys_values_and_the_mixture_are_all_that_is_written(training: bool) -> None:
    arguments = raw(Sizes(batch=1, classes=4, height=8, width=8, channels=32), torch.bfloat16)
    x = arguments[0]
    assert isinstance(x, torch.Tensor)
    with AllocationSpy(limit=x.nbytes) as spy:
        results = torch.ops.errseg.spatial_attention_triton(*arguments, training)
    scores = 2 * x[..., :2].nbytes  # the log sums: a float32 per head and pixel
    maps = 3 / 2 * x.nbytes + (x.nbytes + scores if training else 0)
    assert spy.peak_bytes <= maps + 64
    saved = sum(t.nbytes for t in results[1:])
    assert saved == (maps - x.nbytes if training else 0)


def test_what_a_layer_keeps_for_the_backward_pass() -> None:
    """At B = 4, K = 32, 40 x 40 in bfloat16: input, mixture, keys, values and log sums."""
    x = torch.empty((4, 32, 40, 40, 128), dtype=torch.bfloat16, device="meta")
    arguments = [x, *(torch.empty(0, device="meta"),) * 5, torch.empty((128, 512), device="meta")]
    arguments += [torch.empty(0, device="meta")] * 5
    backend = ops.OPS["spatial_attention"].backends["triton"]
    saved = backend.fake_saved(*arguments, None, 4, 1e-5)
    assert x.nbytes + sum(t.nbytes for t in saved) <= 135e6


def test_transient_memory_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times the input, beside the gradients of weights and maps and a number per head and pixel."""
    kernels = importlib.import_module("errseg.kernels.spatial_attention")
    launch = kernels.Config.launch

    def launch_and_collect(*args: Any) -> None:
        launch(*args)
        gc.collect()  # the interpreter leaves cycles behind that hold its arguments

    monkeypatch.setattr(kernels.Config, "launch", launch_and_collect)
    arguments = raw(Sizes(batch=1, classes=8, height=8, width=8, channels=32), torch.bfloat16)
    arguments = (*arguments[:-3], None, *arguments[-2:])  # drop path makes one more
    out, *saved = kernels.forward(*arguments, True)
    with AllocationSpy() as spy:
        grads = kernels.backward(torch.ones_like(out), *arguments, *saved, [True] * 12)
    small = sum(g.nbytes for g in grads[1:]) + grads[1].nbytes + saved[1].nbytes  # that of the maps in two orders
    assert spy.peak_bytes <= 6 * out.nbytes + small  # the incoming gradient counts too


def test_what_it_cannot_take_is_named() -> None:
    with pytest.raises(ops.BackendError, match="up to 256 channels, got 260"):
        made(Sizes(batch=1, classes=1, height=2, width=2, channels=260, heads=10))(backend="triton")
    with pytest.raises(ops.BackendError, match="heads of up to 64 channels, got 128"):
        made(Sizes(batch=1, classes=1, height=2, width=2, channels=128, heads=1))(backend="triton")
