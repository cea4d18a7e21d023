"""The contract, once for all ops: registration, fakes, compilation, views, synchronisation, choice of backend."""

from __future__ import annotations

import pytest
import torch

from errseg import ops
from errseg.ops import contract
from errseg.testing import forbid_host_syncs
from errseg.testing.compare import assert_close
from errseg.testing.samples import Sample, Sizes, sample
from tests.ops.cases import run_on

every_op = pytest.mark.parametrize("op", ops.OPS)
FLOATING = [name for name, op in ops.OPS.items() if op.differentiable]


def results(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


def test_every_op_is_there() -> None:
    assert set(ops.OPS) == {
        *("class_votes", "select_classes", "cost_volume", "cost_embedding", "spatial_attention", "gated_mlp"),
        *("depthwise_conv", "class_attention", "upsample_residual", "up_step", "upsample_argmax", "upsample_bce"),
    }


@every_op
def test_opcheck(op: str) -> None:
    arguments = sample(op, drop_path=True).to(torch.float32).raw_arguments()
    arguments = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and name in ops.OPS[op].differentiable else a
        for name, a in zip(argument_names(op), arguments, strict=True)
    )
    torch.library.opcheck(ops.OPS[op].overload, (*arguments, "reference"))


def argument_names(op: str) -> list[str]:
    return [a.name for a in ops.OPS[op].overload._schema.arguments if a.name != "backend"]


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fake_foretells_the_result(op: str, dtype: torch.dtype) -> None:
    arguments = sample(op).to(dtype).raw_arguments()
    made = results(ops.OPS[op].overload(*arguments, "reference"))
    foretold = results(ops.OPS[op].fake(*arguments))
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in foretold]


@every_op
def test_compiles_to_one_graph(op: str) -> None:
    torch.compiler.reset()
    call = sample(op, drop_path=True)
    compiled = torch.compile(lambda c: c(backend="reference"), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(results(compiled(call)), results(call()), strict=True):
        assert torch.equal(got, wanted) if not wanted.is_floating_point() else torch.allclose(got, wanted)


@every_op
def test_reads_strided_and_expanded_views(op: str) -> None:
    call = sample(op, drop_path=True)
    viewed = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t)
    assert any(not t.is_contiguous() for t in viewed.leaves() or [viewed.args[0]])
    for got, wanted in zip(results(viewed()), results(call()), strict=True):
        assert_close(got, wanted, 1e-13)


@every_op
def test_takes_an_empty_batch(op: str) -> None:
    for result in results(sample(op, Sizes(batch=0))()):
        assert result.shape[:1] == (0,) or result.item() == 0.0


@every_op
def test_never_synchronises_with_the_host(op: str) -> None:
    call = sample(op, drop_path=True).to(torch.float32)
    with forbid_host_syncs():
        call()


@pytest.mark.parametrize("op", FLOATING)
def test_every_differentiable_argument_gets_its_gradient(op: str) -> None:
    arguments = sample(op, drop_path=True).raw_arguments()
    named = dict(zip(argument_names(op), arguments, strict=True))
    wanted = [named[name].requires_grad_() for name in ops.OPS[op].differentiable]
    result = ops.OPS[op].overload(*named.values(), "reference")
    grads = torch.autograd.grad(result.square().sum(), wanted)
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("op", [name for name in ops.OPS if name not in FLOATING])
def test_counts_and_labels_carry_no_gradient(op: str) -> None:
    call = sample(op).map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    assert not any(result.requires_grad for result in results(call()))


# ---- choosing a backend, on an op made for the purpose


@pytest.fixture(scope="module")
def doubled() -> contract.Op:
    op = contract.Op(
        "test_doubled",
        "(Tensor x, float shift) -> Tensor",
        reference=lambda x, shift: 2.0 * x + shift,
        fake=lambda x, shift: torch.empty_like(x),
        differentiable=("x",),
    )
    del contract.OPS["test_doubled"]
    op.register(
        "cpu",
        contract.Backend(
            forward=lambda x, shift: (2.0 * x + shift).contiguous(),
            backward=lambda grad, x, shift, needed: [2.0 * grad],
            can_run=lambda x, shift: None if x.dtype == torch.float32 else f"float32 only, got {x.dtype}",
        ),
    )
    op.register(
        "triton",
        contract.Backend(
            forward=lambda x, shift, training: (
                2.0 * x + shift,
                torch.full_like(x, 2.0) if training else x.new_empty(0),
            ),
            backward=lambda grad, x, shift, slope, needed: [slope * grad],
            saved=("slope",),
            fake_saved=lambda x, shift: (torch.empty_like(x),),
            shape_only=("x",),
            available=lambda: contract.INTERPRETED,
        ),
    )
    op.register("cuda", contract.Backend(available=lambda: "no NVIDIA GPU"))
    return op


def test_the_first_backend_that_can_run_is_taken(doubled: contract.Op) -> None:
    assert doubled.choose(None, torch.ones(2), 0.0) == "cpu"
    assert doubled.choose(None, torch.ones(2, dtype=torch.float64), 0.0) == "reference"


def test_a_named_backend_runs_or_raises_with_the_reason(doubled: contract.Op) -> None:
    assert doubled(torch.ones(2), 1.0, backend="cpu").tolist() == [3.0, 3.0]
    with pytest.raises(ops.BackendError, match=r"float32 only, got torch\.float64"):
        doubled(torch.ones(2, dtype=torch.float64), 1.0, backend="cpu")
    with pytest.raises(ops.BackendError, match="no NVIDIA GPU"):
        doubled(torch.ones(2), 1.0, backend="cuda")
    with pytest.raises(ops.BackendError, match="not a backend"):
        doubled(torch.ones(2), 1.0, backend="opencl")
    with pytest.raises(ops.BackendError, match="this op has none"):
        ops.gated_mlp(*sample("gated_mlp").args, backend="cuda")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_gets_gradients_compilation_and_opcheck(doubled: contract.Op, backend: str) -> None:
    x = torch.randn(5, requires_grad=True)
    result = doubled(x, 1.0, backend=backend)
    assert torch.equal(result, 2 * x + 1)
    assert torch.autograd.grad(result.sum(), x)[0].tolist() == [2.0] * 5
    compiled = torch.compile(lambda t: doubled(t, 1.0, backend=backend) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * x + 2)
    assert torch.autograd.grad(compiled(x).sum(), x)[0].tolist() == [2.0] * 5
    raw = getattr(torch.ops.errseg, f"test_doubled_{backend}").default
    torch.library.opcheck(raw, (x, 1.0) if backend == "cpu" else (x, 1.0, True))


def test_what_is_only_added_gets_the_incoming_gradient() -> None:
    asked: list[list[bool]] = []

    def backward(
        grad: torch.Tensor, x: torch.Tensor, shift: torch.Tensor | None, needed: list[bool]
    ) -> list[torch.Tensor]:
        asked.append(needed)
        return [3.0 * grad, grad.new_empty(0)]

    op = contract.Op(
        "test_shifted",
        "(Tensor x, Tensor? shift) -> Tensor",
        reference=lambda x, shift: 3.0 * x if shift is None else 3.0 * x + shift,
        fake=lambda x, shift: torch.empty_like(x),
        differentiable=("x", "shift"),
        added=("shift",),
    )
    del contract.OPS["test_shifted"]
    op.register("cpu", contract.Backend(forward=op.reference, backward=backward))
    x, shift = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    grad = torch.randn(5)
    got = torch.autograd.grad(op(x, shift, backend="cpu"), (x, shift), grad)
    assert torch.equal(got[0], 3 * grad) and got[1].data_ptr() == grad.data_ptr() and asked == [[True, False]]
    for second in (shift, shift.detach(), None):
        torch.library.opcheck(torch.ops.errseg.test_shifted_cpu.default, (x, second))


def test_what_only_training_needs_is_saved_in_training_only(doubled: contract.Op) -> None:
    x = torch.randn(5)
    assert torch.ops.errseg.test_doubled_triton(x, 1.0, False)[1].numel() == 0
    assert doubled(x, 1.0, backend="triton").requires_grad is False


def test_an_argument_needed_for_its_shape_only_is_not_kept(doubled: contract.Op) -> None:
    kept = []
    x = torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        doubled(x, 1.0, backend="triton")
    shape, slope = kept
    assert shape.shape == x.shape and shape.dtype == x.dtype and shape.untyped_storage().nbytes() == 4
    assert slope.tolist() == [2.0] * 5


def test_an_interpreted_backend_runs_only_when_named(doubled: contract.Op) -> None:
    x = torch.ones(2, dtype=torch.float64)
    assert doubled.choose("triton", x, 0.0) == "triton"
    with ops.use_backend("triton", "reference"):
        assert doubled.choose(None, x, 0.0) == "triton"
    doubled.order["cpu"] = ("triton", "reference")
    assert doubled.choose(None, x, 0.0) == "reference"
    doubled.order["cpu"] = ("cpu", "reference")


def test_a_backend_without_a_backward_says_so() -> None:
    op = contract.Op(
        "test_forward_only",
        "(Tensor x) -> Tensor",
        reference=lambda x: 2 * x,
        fake=torch.empty_like,
        differentiable=("x",),
    )
    del contract.OPS["test_forward_only"]
    op.register("cpu", contract.Backend(forward=lambda x: 2 * x))
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="test_forward_only_cpu has no backward pass"):
        op(x, backend="cpu").sum().backward()


def test_tests_take_arguments_to_a_backend_and_results_back(doubled: contract.Op) -> None:
    """What tests/ops/conftest.py does on a machine with a GPU, here with the CPU for a GPU."""
    x = torch.randn(3, requires_grad=True)
    result = run_on("cpu", contract.Op.__call__, doubled, x, 1.0, backend="cpu")
    assert torch.autograd.grad(result.sum(), x)[0].tolist() == [2.0] * 3
    with pytest.raises(pytest.skip.Exception, match="float32 only"):
        run_on("cpu", contract.Op.__call__, doubled, x.double(), 1.0, backend="cpu")


def test_use_backend_as_a_context_and_as_a_call(doubled: contract.Op) -> None:
    x = torch.ones(2)
    with ops.use_backend("cuda", "reference"):
        assert doubled.choose(None, x, 0.0) == "reference"
    assert doubled.choose(None, x, 0.0) == "cpu"
    ops.use_backend("cuda")
    with pytest.raises(ops.BackendError, match="no NVIDIA GPU"):
        doubled(x, 0.0)
    ops.use_backend()
    assert doubled.choose(None, x, 0.0) == "cpu"
    with pytest.raises(ops.BackendError, match="no backend 'fast'"):
        ops.use_backend("fast")


def test_compiled_code_follows_use_backend(doubled: contract.Op) -> None:
    chosen: list[str] = []
    compiled = torch.compile(lambda t: chosen.append(doubled.choose(None, t, 0.0)) or doubled(t, 0.0), backend="eager")
    compiled(torch.ones(3))
    with ops.use_backend("reference"):
        compiled(torch.ones(3))
    assert chosen == ["cpu", "reference"]


def test_backends_lists_every_pair() -> None:
    table = ops.backends()
    assert set(table) == set(ops.OPS)
    assert all(set(row) == set(ops.BACKENDS) and row["reference"] is None for row in table.values())


def test_two_ops_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="defined twice"):
        contract.Op("gated_mlp", "(Tensor x) -> Tensor", reference=lambda x: x, fake=lambda x: x)


def test_a_sample_draws_the_same_call_twice() -> None:
    first, second = sample("gated_mlp", seed=3), sample("gated_mlp", seed=3)
    assert isinstance(first, Sample)
    assert all(torch.equal(a, b) for a, b in zip(first.leaves(), second.leaves(), strict=True))
