"""What the op tests of cost_embedding do not reach: splits, needed gradients, scratch, layouts, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, assert_close, poisoned_memory
from errseg.testing.samples import Sizes, sample

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"
NAMES = ("cost16", "cost32", "weight16", "weight32", "bias")
SMALL = Sizes(batch=1, classes=2, height=3, width=4)


@pytest.fixture
def kernels() -> Any:
    from errseg.kernels import cost_embedding

    return cost_embedding


def raw_arguments(sizes: Sizes = SMALL) -> list[Tensor]:
    call = sample("cost_embedding", sizes).to(torch.float32)
    return [t.detach().to(DEVICE).requires_grad_() for t in call.raw_arguments()]


def embed(*arguments: Tensor, backend: str = "triton") -> Tensor:
    return ops.OPS["cost_embedding"].overload(*arguments, backend)


def check(arguments: list[Tensor], tolerance: float = 1e-6) -> None:
    """Embedding and gradients; what is not written is NaN."""
    grad = torch.rand(*arguments[0].shape, len(arguments[4]), device=DEVICE)  # no cancellation in the sums
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in arguments]
        with poisoned_memory():
            out = embed(*leaves, backend=backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, tolerance)


def test_opcheck() -> None:
    torch.library.opcheck(ops.OPS["cost_embedding"].overload, (*raw_arguments(), "triton"))


def test_a_compiled_loss_gives_the_eager_gradients() -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()  # so that the compiler meets the question, not the answer
    call = sample("cost_embedding", SMALL).to(torch.float32).map(lambda t: t.to(DEVICE).requires_grad_())

    def loss(*leaves: Tensor) -> Tensor:
        return call.with_leaves(iter(leaves))(backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(*call.leaves()), call.leaves()) for f in (loss, compiled))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize("channels", [1, 70])
def test_channels_past_a_tile_and_splits_of_several_tiles(
    channels: int, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 5)
    check(raw_arguments(Sizes(batch=2, classes=1, height=9, width=17, channels=channels)))


def test_strided_transposed_and_expanded_arguments() -> None:
    cost16, cost32, weight16, weight32, bias = raw_arguments(Sizes(batch=2, classes=3, height=8, width=6))
    check([cost16.mT, cost32[..., :2], weight16.mT, weight32.flip(-1), bias[:1].expand(16)])
    check([cost16[:, ::2], cost32[:1, :1].expand(2, 2, -1, -1), weight16[::2], weight32[::2], bias[::2]])


def test_an_expanded_gradient() -> None:
    leaves = raw_arguments()
    out = embed(*leaves)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    whole = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(expanded, whole, strict=True))


def test_an_empty_batch() -> None:
    leaves = raw_arguments(Sizes(batch=0))
    out = embed(*leaves)
    assert out.shape == (0, 5, 7, 9, 16)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same as among others, and kernels that it does not need are not launched."""
    leaves = raw_arguments()
    wanted = torch.autograd.grad(embed(*leaves).square().sum(), leaves)[NAMES.index(name)]
    leaves = [t.detach().requires_grad_(n == name) for n, t in zip(NAMES, leaves, strict=True)]
    loss = embed(*leaves).square().sum()
    launched = []
    launch = kernels.Config.launch
    monkeypatch.setattr(kernels.Config, "launch", lambda self, *a: launched.append(self) or launch(self, *a))
    assert torch.equal(torch.autograd.grad(loss, leaves[NAMES.index(name)])[0], wanted)
    names = {id(config): label.removesuffix(" torch.float32") for label, config in kernels.CONFIGS.items()}
    merged = {"bwd merge", "bwd fold merged"}
    costs = {"pack", "bwd cost", *(merged if name == "cost32" else {"bwd fold"})}
    assert {names[id(config)] for config in launched} == (
        costs if name.startswith("cost") else {"bwd weight", "bwd sum"}
    )


def test_scratch_of_the_backward_pass(kernels: Any) -> None:
    """The docstring's account, for smaller sizes."""
    arguments = [t.detach().bfloat16() for t in raw_arguments(Sizes(batch=1, classes=6, height=16, width=16))]
    grad = embed(*arguments)
    maps, tiles, taps = 6, 4, 49
    with AllocationSpy() as spy:
        kernels.backward(grad, *arguments, [False, False, True, True, True])
    splits = maps * tiles // 4
    assert spy.peak_bytes <= 4 * splits * 2 * 16 * 64 + 2 * 16 * (2 * 49 + 1)
    with AllocationSpy() as spy:
        kernels.backward(grad, *arguments, [True, True, False, False, False])
    products = maps * taps * (2 * 256 + 2 * tiles * 36 + 4 * 64)
    gradients, weights = 2 * maps * (256 + 64), 2 * 2 * 16 * 64
    assert spy.peak_bytes <= products + gradients + weights


def test_float32_products_are_made_of_three_tf32_products(kernels: Any) -> None:
    """The interpreter computes tf32 as float32, so that no result could show a wrong choice here."""
    for label, config in kernels.CONFIGS.items():
        precision = config.constants.get("PRECISION")
        assert precision is None or (precision == "tf32x3") == label.endswith("float32"), label


def test_unsupported_arguments_are_named() -> None:
    cost16, cost32, weight16, weight32, bias = raw_arguments()
    op = ops.OPS["cost_embedding"]
    for arguments, reason in (
        ((cost16, cost32, weight16[..., 1:6, 1:6], weight32, bias), r"windows of 7 x 7, got \[16, 1, 5, 5\]"),
        ((cost16, cost32.half(), weight16, weight32, bias), r"one dtype, got torch\.float16, torch\.float32"),
        ((cost16[..., :1].expand(-1, -1, -1, 40_000), cost32, weight16, weight32, bias), "32767 pixels a side"),
    ):
        with pytest.raises(ops.BackendError, match=reason):
            op(*arguments, backend="triton")
