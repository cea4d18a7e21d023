"""The up-decoder's step in Triton: compilation, views, memory, what it refuses, and that NaN stays."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, assert_close, poisoned_memory
from errseg.testing.samples import Sample, Sizes, sample

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
SMALL = Sizes(batch=1, classes=2, height=3, width=4)


def made(sizes: Sizes = SMALL, dtype: torch.dtype = torch.float32) -> Sample:
    return sample("up_step", sizes).to(dtype).map(lambda t: t.to(DEVICE))


def kernels() -> Any:
    return importlib.import_module("errseg.kernels.up_step")


def test_opcheck() -> None:
    arguments = made(Sizes(batch=1, classes=1, height=2, width=1)).raw_arguments()
    arguments = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(ops.OPS["up_step"].overload, (*arguments, "triton"))


def test_compiles_to_one_graph_with_its_gradient() -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()  # so that the compiler meets the question, not the answer
    call = made()
    x, guidance = call.args[0].requires_grad_(), call.args[1].requires_grad_()

    def run(x: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        return ops.up_step(x, guidance, call.args[2], backend="triton").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, guidance), (x, guidance)) for f in (run, compiled)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_views_and_empty_batches() -> None:
    call = made()
    strided = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    assert torch.equal(strided(backend="triton"), call(backend="triton"))
    turned = call.args[0].transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(ops.up_step(turned, *call.args[1:], backend="triton"), call(backend="triton"))
    empty = made(Sizes(batch=0)).map(lambda t: t.requires_grad_())
    result = empty(backend="triton")
    assert result.shape == (0, 5, 14, 18, 8)
    grads = torch.autograd.grad(result.sum(), empty.leaves())
    assert all((grad == 0).all() for grad in grads)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in made().raw_arguments()]
    grad = torch.ones(1, 2, 6, 8, 8, device=DEVICE)
    with poisoned_memory():
        full = kernels().backward(grad, *arguments, [True] * 8)
        for wanted in ((0,), (1, 2), (7,)):
            some = kernels().backward(grad, *arguments, [i in wanted for i in range(8)])
            for i in range(8):
                assert torch.equal(some[i], full[i]) if i in wanted else not some[i].numel()


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass() -> None:
    arguments = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in made().raw_arguments()]
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.OPS["up_step"](*arguments, backend="triton")
    assert kept == {a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)}


def test_scratch_is_one_map() -> None:
    arguments = made(Sizes(batch=1, classes=1, height=8, width=8, channels=128)).raw_arguments()
    with AllocationSpy() as spy:
        result = ops.OPS["up_step"](*arguments, backend="triton")
    weights = sum(a.nbytes for a in (arguments[2], arguments[5]))
    assert spy.peak_bytes < 2 * result.nbytes + weights + result.nbytes // 10


def test_nan_stays_in_its_map() -> None:
    x, *rest = made(dtype=torch.float64).raw_arguments()
    clean = ops.OPS["up_step"](x, *rest, backend="triton")
    x = x.detach().clone()
    x[0, 1, 2, 3] = float("nan")
    result = ops.OPS["up_step"](x, *rest, backend="triton")
    assert result[0, 1].isnan().all()
    assert_close(result[0, 0], clean[0, 0], 1e-15)


def test_too_many_channels_and_mixed_dtypes_are_named() -> None:
    with pytest.raises(ops.BackendError, match="up to 128 channels, got 144"):
        made(Sizes(batch=1, classes=1, height=1, width=1, channels=144))(backend="triton")
    x, added, *rest = made().raw_arguments()
    with pytest.raises(ops.BackendError, match=r"one dtype, got torch\.float32, torch\.float64"):
        ops.OPS["up_step"](x, added.double(), *rest, backend="triton")


def test_float32_is_multiplied_in_three_tf32_products() -> None:
    """The interpreter computes tf32 as float32, so that no result could show a wrong choice here."""
    products = {name: c.constants["PRECISION"] for name, c in kernels().CONFIGS.items() if "PRECISION" in c.constants}
    assert set(products.values()) == {"tf32x3", "ieee"}
    assert all((precision == "tf32x3") == ("float32" in name) for name, precision in products.items())
