"""Counts of arithmetic and traffic against what PyTorch counts and what the tensors hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from errseg import ops
from errseg.bench.cases import Case
from errseg.bench.registry import BUILT_OF_OPS, find_target, target_names
from errseg.bench.targets._ops import EVAL_B
from errseg.testing.samples import map_tensors

# No odd side, whose last row a pooling drops, and a vocabulary that the reference does not pad.
EVEN = Case(model="small", batch=2, classes=5, words=64, size=128)


def tensors(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("name", sorted(ops.OPS))
def test_counts_of_an_op(name: str) -> None:
    target = find_target(name)
    arguments = target.inputs(EVEN, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), ops.use_backend("reference"):
        result = target.implementations["errseg"](EVEN).run(*arguments)
    counts = target.counts(EVEN, 4, "forward")
    # Composing published weights is arithmetic on weights alone: below a percent at any real size.
    composed = counter.get_total_flops() - counts.matmul
    assert 0 <= composed <= 0.2 * counts.matmul
    moved = sum(t.nbytes for t in (*tensors(arguments), *pytree.tree_leaves(result)))
    if name == "cost_volume":  # only the selected words are read
        moved -= 4 * (EVEN.words - EVEN.batch * EVEN.kept) * EVEN.decoder.text_dim
    assert counts.bytes == moved


def test_counts_at_real_size_are_the_known_ones() -> None:
    gflop = {
        "class_votes": 1.73,
        "cost_embedding": 1.20,
        "gated_mlp": 22.6,
        "depthwise_conv": 0.963,
        "spatial_attention": 30.4,
        "class_attention": 8.65,
    }
    for name, expected in gflop.items():
        assert find_target(name).counts(EVAL_B, 4, "forward").matmul / 1e9 == pytest.approx(expected, rel=5e-3), name


def test_both_is_forward_and_backward() -> None:
    for name in ("gated_mlp", "cost_volume"):
        counts = find_target(name).counts
        assert counts(EVEN, 4, "both") == counts(EVEN, 4, "forward") + counts(EVEN, 4, "backward")


def test_counts_of_the_head_come_from_the_reference() -> None:
    target = find_target("head")
    forward = target.counts(target.quick, 4, "forward")
    assert target.counts(target.quick, 4, "both").matmul > 2.5 * forward.matmul > 0
    assert target.counts(replace(target.quick, classes=10), 4, "forward").matmul > 1.5 * forward.matmul


@pytest.mark.parametrize("name", ["spatial_block", "class_block"])
def test_gradients_take_about_twice_what_the_result_takes(name: str) -> None:
    counts = find_target(name).counts
    forward, backward = (counts(EVAL_B, 4, passing).matmul for passing in ("forward", "backward"))
    assert 1.7 * forward < backward < 2.1 * forward


def test_every_op_is_a_target_and_labels_are_unique() -> None:
    names = target_names()
    assert set(names) == {*ops.OPS, *BUILT_OF_OPS}
    for name in names:
        target = find_target(name)
        assert target.name == name and "published" in target.implementations
        labels = [case.label for case in target.cases]
        assert len(set(labels)) == len(labels)
        assert all(bar.case in target.cases for bar in target.bars)


def test_a_size_is_a_multiple_of_32() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        Case(size=100)


def test_inputs_are_exact_in_bfloat16() -> None:
    for name in ("head", "rrhc", "class_block", "model", "train", "upsample_bce", "class_votes", "spatial_attention"):
        target = find_target(name)
        for tensor in tensors(target.inputs(target.quick, 1)):
            assert not tensor.is_floating_point() or torch.equal(tensor, tensor.bfloat16().float()), name
