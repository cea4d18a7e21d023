"""What the op tests do not reach: several programs per axis, splits of the vocabulary, scratch, compilation."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from errseg import ops
from errseg.ops import triton_backend
from errseg.testing import AllocationSpy, assert_close, poisoned_memory
from errseg.testing.samples import Sizes, sample

OPS = ("class_votes", "upsample_argmax", "upsample_bce")
SMALL = Sizes(height=3, width=4)

if triton_backend.available() not in (None, "interpreted"):
    pytest.skip(str(triton_backend.available()), allow_module_level=True)
DEVICE = "cpu" if triton_backend.available() == "interpreted" else "cuda"


def kernels(op: str) -> Any:
    return importlib.import_module(f"errseg.kernels.{op}")


def raw_arguments(op: str) -> tuple[Any, ...]:
    call = sample(op, SMALL).to(torch.float32).map(lambda t: t.to(DEVICE))
    arguments = call.raw_arguments()
    return tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and op == "upsample_bce" else a
        for a in arguments
    )


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(ops.OPS[op].overload, (*raw_arguments(op), "triton"))


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph(op: str) -> None:
    torch.compiler.reset()
    triton_backend._find_out.cache_clear()  # so that the compiler meets the question, not the answer
    call = sample(op, SMALL).to(torch.float32).map(lambda t: t.to(DEVICE))
    compiled = torch.compile(lambda c: c(backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call), call(backend="triton"), rtol=0, atol=0)


def test_a_compiled_loss_gives_the_eager_gradient() -> None:
    torch.compiler.reset()
    call = sample("upsample_bce", SMALL).to(torch.float32).map(lambda t: t.to(DEVICE))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return ops.upsample_bce(logits, *call.args[1:], **call.kwargs, backend="triton")

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logits = call.args[0].clone().requires_grad_()
        function(logits).backward()
        grads.append(logits.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.parametrize("op", OPS)
def test_strided_arguments_and_empty_batches(op: str) -> None:
    call = sample(op, SMALL).to(torch.float32).map(lambda t: t.to(DEVICE))
    strided = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    torch.testing.assert_close(strided(backend="triton"), call(backend="triton"), rtol=0, atol=0)
    empty = sample(op, Sizes(batch=0)).to(torch.float32).map(lambda t: t.to(DEVICE))
    torch.testing.assert_close(empty(backend="triton"), empty(backend="reference"))


@pytest.mark.parametrize("exclude_ignored", [False, True])
def test_the_loss_over_several_patches_strips_and_class_blocks(exclude_ignored: bool) -> None:
    """35 cells across need two patches of 31, 6 down two strips of 4, 5 classes two blocks of 4."""
    logits, ids, target = (t.to(DEVICE) for t in sample("upsample_bce", Sizes(batch=1, height=6, width=35)).args)
    target = target[:, ::2, ::2]  # an odd scale, 10 x 70 from 6 x 35
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        with poisoned_memory():
            loss = ops.upsample_bce(
                leaf, ids, target, vocabulary_size=11, exclude_ignored=exclude_ignored, backend=backend
            )
            loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert_close(results[1][0], results[0][0], 1e-6)
    assert_close(results[1][1], results[0][1], 1e-6)


def test_the_loss_shrinks_too() -> None:
    """Outputs that skip cells leave these without a gradient."""
    logits, ids, _ = (t.to(DEVICE) for t in sample("upsample_bce", Sizes(batch=1, height=9, width=11)).args)
    target = torch.randint(0, 11, (1, 4, 3), device=DEVICE)
    grads = []
    for backend in ("reference", "triton"):
        leaf = logits.clone().requires_grad_()
        with poisoned_memory():
            ops.upsample_bce(leaf, ids, target, vocabulary_size=11, backend=backend).backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], 1e-12)
    assert (grads[1] == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-60.0, -12.0, 0.0, 12.0, 60.0])
def test_the_loss_of_sure_logits_keeps_its_digits(value: float, dtype: torch.dtype) -> None:
    """log(1 + exp(x)) is tiny for a sure negative: 1 + exp(x) alone would round it away."""
    logits = torch.full((1, 1, 2, 2), value, dtype=dtype, device=DEVICE)
    target = torch.full((1, 3, 3), 255, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_bce(logits, ids, target, vocabulary_size=1, backend="triton")
    wanted = F.softplus(torch.tensor(value, dtype=torch.float64), threshold=1000).log()
    assert abs(loss.double().log().item() - wanted.item()) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_equal_words_tie_across_splits_and_the_vocabulary_costs_no_scratch() -> None:
    """Every word is the same: each pixel ranks the first three, whichever program and tile they came from."""
    words = torch.randn(1, 8, device=DEVICE).expand(20_001, 8)
    pixels = torch.randn(2, 8, 1, 3, device=DEVICE)
    with AllocationSpy() as spy:
        votes = kernels("class_votes").forward(pixels, words)
    assert votes[:, :4].tolist() == [[300, 30, 3, 0]] * 2 and votes.sum() == 2 * 333
    # Votes and lengths grow with the vocabulary; the words are read where they lie.
    results = votes.nbytes + 4 * words.shape[0]
    assert spy.peak_bytes < results + 3 * 8 * 6 * 400


@pytest.mark.parametrize("return_scores", [True, False])
def test_scratch_of_the_label_map_is_the_size_of_the_logits(return_scores: bool) -> None:
    logits, ids = torch.randn(1, 12, 5, 6, device=DEVICE), torch.arange(12, device=DEVICE)[None]
    with AllocationSpy() as spy:
        labels, scores = kernels("upsample_argmax").forward(logits, ids, 40, 50, return_scores)
    assert scores.shape == (labels.shape if return_scores else (0,))
    assert spy.peak_bytes <= labels.nbytes + scores.nbytes + logits.nbytes + 4 * 12


def test_labels_of_many_classes_blocks_and_batches() -> None:
    """More classes than one block of ids, more columns than one program, a scale with a remainder."""
    logits, ids = torch.randn(2, 70, 2, 3, device=DEVICE), torch.rand(2, 999, device=DEVICE).argsort(1)[:, :70]
    with poisoned_memory():
        labels, scores = ops.upsample_argmax(logits, ids, (7, 131), return_scores=True, backend="triton")
    wanted = ops.upsample_argmax(logits.double(), ids, (7, 131), return_scores=True, backend="reference")
    assert torch.equal(labels, wanted[0])
    assert_close(scores, wanted[1], 1e-6)


def test_float32_words_are_multiplied_in_three_tf32_products() -> None:
    """The interpreter computes tf32 as float32, so that no result could show a wrong choice here."""
    configs = kernels("class_votes").CONFIGS
    assert configs["fwd torch.float32"].constants["PRECISION"] == "tf32x3"
    assert {configs[f"fwd {dtype}"].constants["PRECISION"] for dtype in (torch.float64, torch.bfloat16)} == {"ieee"}


def test_unsupported_arguments_are_named() -> None:
    logits, ids, *_ = raw_arguments("upsample_argmax")
    with pytest.raises(ops.BackendError, match="maps of up to 32767 pixels a side, got 40000"):
        ops.upsample_argmax(logits, ids, (40_000, 3), backend="triton")
    with pytest.raises(ops.BackendError, match=r"no kernel for torch\.float8_e5m2"):
        ops.class_votes(
            torch.zeros(1, 2, 1, 1, device=DEVICE, dtype=torch.float8_e5m2),
            torch.zeros(1, 2, device=DEVICE, dtype=torch.float8_e5m2),
            backend="triton",
        )
