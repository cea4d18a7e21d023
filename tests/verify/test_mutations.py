"""Proof by mutation: a kernel broken on purpose fails and its row is named; the same kernel unbroken passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errseg import ops, verify
from errseg.ops import contract
from errseg.verify import runner
from errseg.verify.cases import cases
from errseg.verify.rows import FAILED, PASSED, Row

Run = Callable[..., list[Row]]
NAMES = (f"mutant_{number}" for number in itertools.count())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Verify an op whose backend `cpu` is a function of this file, on the cases named."""

    def verified(op: str, forward: Callable[..., Any], *shapes: str, backward: Any = None) -> list[Row]:
        real = ops.OPS[op]
        other = contract.Op(
            next(NAMES), real.schema, reference=real.reference, fake=real.fake, differentiable=real.differentiable
        )
        del contract.OPS[other.name]
        backward = backward or (gradients_of(forward, other) if other.differentiable else None)
        other.register("cpu", contract.Backend(forward=forward, backward=backward))
        monkeypatch.setitem(contract.OPS, op, other)
        monkeypatch.setattr(import_module(f"errseg.ops.{op}"), "OP", other)
        grid = [case for case in cases(op, quick=True) if case.name in shapes]
        assert len(grid) == len(shapes)
        monkeypatch.setattr(runner, "cases", lambda name, quick: grid)
        return verify.run(quick=True, ops=[op], backends=["cpu"])

    return verified


def gradients_of(forward: Callable[..., Any], op: contract.Op) -> Callable[..., list[Tensor]]:
    """A backward pass by autograd through `forward`."""

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        arguments = list(args[:-1])
        positions = op._positions()
        with torch.enable_grad():
            leaves = [arguments[p].detach().requires_grad_() for p in positions]
            for p, leaf in zip(positions, leaves, strict=True):
                arguments[p] = leaf
            grads = torch.autograd.grad(forward(*arguments), leaves, grad, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]

    return backward


def failing(rows: Sequence[Row]) -> set[str]:
    assert rows and not verify.succeeded(list(rows))
    return {f"{row.dtype}: {row.case}" for row in rows if row.status == FAILED}


def everywhere(*shapes: str) -> set[str]:
    return {f"{dtype}: {shape}" for dtype in ("float32", "bfloat16", "float16") for shape in shapes}


# ---- label maps


def argmax_by_class(logits: Tensor, class_ids: Tensor, height: int, width: int, *flags: bool) -> tuple[Tensor, Tensor]:
    """Class by class, so that equal maps get equal probabilities."""
    ids, order = class_ids.sort(dim=1)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    labels = ids.new_zeros((len(ids), height, width), dtype=torch.int32)
    scores = probabilities.new_full((len(ids), height, width), -1.0)
    for k in range(ids.shape[1]):
        mine = torch.stack([p[o] for p, o in zip(probabilities, order[:, k], strict=True)])[:, None]
        mine = F.interpolate(mine, size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        better = mine > scores
        labels = torch.where(better, ids[:, k, None, None].to(torch.int32), labels)
        scores = torch.where(better, mine, scores)
    return labels, scores


TIES = ("odd sizes", "equal classes", "ids in disorder", "past a tile")


def test_an_unbroken_argmax_passes(run: Run) -> None:
    rows = run("upsample_argmax", argmax_by_class, *TIES)
    assert verify.succeeded(rows) and {row.status for row in rows} == {PASSED}


def test_a_wrong_tie_rule_is_found(run: Run) -> None:
    def highest(logits: Tensor, class_ids: Tensor, height: int, width: int, *flags: bool) -> tuple[Tensor, Tensor]:
        labels, scores = argmax_by_class(logits, 1000 - class_ids, height, width)
        return 1000 - labels, scores

    assert failing(run("upsample_argmax", highest, *TIES)) == everywhere("equal classes", "ids in disorder")


def test_an_unwritten_tail_is_found(run: Run) -> None:
    def unwritten(logits: Tensor, class_ids: Tensor, height: int, width: int, *flags: bool) -> tuple[Tensor, Tensor]:
        labels, scores = argmax_by_class(logits, class_ids, height, width)
        memory = torch.empty_like(labels)
        memory[..., :-1] = labels[..., :-1]
        return memory, scores

    assert failing(run("upsample_argmax", unwritten, *TIES)) == everywhere(*TIES)


def test_labels_from_half_precision_probabilities_are_found(run: Run) -> None:
    def coarse(logits: Tensor, class_ids: Tensor, height: int, width: int, *flags: bool) -> tuple[Tensor, Tensor]:
        labels, _ = argmax_by_class(logits.bfloat16(), class_ids, height, width)
        rounded = logits.float().sigmoid().bfloat16()
        maps = F.interpolate(rounded, size=(height, width), mode="bilinear", align_corners=False)
        best = class_ids.gather(1, maps.argmax(1).flatten(1)).view_as(labels)
        return best.to(torch.int32), argmax_by_class(logits, class_ids, height, width)[1]

    assert failing(run("upsample_argmax", coarse, "past a tile")) == everywhere("past a tile")


# ---- votes


def votes_in(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    def votes(images: Tensor, words: Tensor) -> Tensor:
        words = F.normalize(words.to(dtype), dim=1, eps=1e-12)
        scores = torch.stack([(words[:, None] * image.T.to(dtype)).sum(-1) for image in images.flatten(2)])
        order = scores.double().argsort(dim=1, descending=True, stable=True)[:, :3]  # [B, 3, P]
        counted = torch.zeros(len(images), len(words), dtype=torch.int64)
        for rank in range(order.shape[1]):
            counted.scatter_add_(1, order[:, rank], torch.full_like(order[:, rank], 10 ** (2 - rank)))
        return counted

    return votes


VOTES = ("odd sizes", "every word three times", "2 words", "300 words")


def test_unbroken_votes_pass(run: Run) -> None:
    assert {row.status for row in run("class_votes", votes_in(torch.float32), *VOTES)} == {PASSED}


def test_votes_with_a_wrong_tie_rule_are_found(run: Run) -> None:
    def highest(images: Tensor, words: Tensor) -> Tensor:
        return votes_in(torch.float32)(images, words.flip(0)).flip(1)

    assert failing(run("class_votes", highest, *VOTES)) == everywhere("every word three times")


def test_votes_of_half_precision_products_are_found(run: Run) -> None:
    assert everywhere("300 words") <= failing(run("class_votes", votes_in(torch.bfloat16), *VOTES))


def test_a_dropped_last_tile_of_words_is_found(run: Run) -> None:
    def dropped(images: Tensor, words: Tensor) -> Tensor:
        kept = max(1, len(words) // 64 * 64)
        counted = votes_in(torch.float32)(images, words[:kept])
        return F.pad(counted, (0, len(words) - kept))

    assert everywhere("300 words") <= failing(run("class_votes", dropped, *VOTES))


# ---- floating results and gradients

SHAPES = ("odd sizes", "published channels")


def mlp(*args: Any) -> Tensor:
    return ops.reference.gated_mlp(*args)


def test_an_unbroken_mlp_passes(run: Run) -> None:
    assert {row.status for row in run("gated_mlp", mlp, *SHAPES)} == {PASSED}


def test_a_dropped_last_tile_of_tokens_is_found(run: Run) -> None:
    def dropped(x: Tensor, *rest: Any) -> Tensor:
        out = mlp(x, *rest)
        keep = torch.ones(out.shape[:-1].numel()).view(*out.shape[:-1], 1)
        keep.view(-1)[out.shape[:-1].numel() // 16 * 16 :] = 0
        return out * keep.to(out.dtype)

    assert failing(run("gated_mlp", dropped, *SHAPES)) == everywhere(*SHAPES)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_number_that_is_none_is_found(run: Run, poison: float) -> None:
    def spoilt(*args: Any) -> Tensor:
        out = mlp(*args).clone()
        out.view(-1)[-1] = poison
        return out

    rows = run("gated_mlp", spoilt, *SHAPES, backward=lambda grad, *args: [torch.zeros_like(t) for t in args[:7]])
    assert failing(rows) == everywhere(*SHAPES)


@pytest.mark.parametrize("position", range(4))
def test_a_gradient_off_by_a_thousandth_is_found(run: Run, position: int) -> None:
    def conv(*args: Any) -> Tensor:
        return ops.reference.depthwise_conv(*args)

    honest = gradients_of(conv, ops.OPS["depthwise_conv"])

    def slightly_off(grad: Tensor, *args: Any) -> list[Tensor]:
        grads = honest(grad, *args)
        grads[position] = grads[position] * 1.001
        return grads

    rows = run("depthwise_conv", conv, *SHAPES, backward=slightly_off)
    assert {f"float32: {shape}" for shape in SHAPES} <= failing(rows)
    name = ("x", "weight", "bias", "residual")[position]
    wrong = [check.quantity for row in rows if row.dtype == "float32" for check in row.checks if not check.passed]
    assert set(wrong) == {f"grad {name}"}


def test_the_wrong_shape_and_dtype_are_found(run: Run) -> None:
    def halved(*args: Any) -> Tensor:
        return ops.reference.depthwise_conv(*args).half()

    rows = run("depthwise_conv", halved, *SHAPES)
    assert {f"float32: {shape}" for shape in SHAPES} <= failing(rows)


def test_an_exception_is_a_failure_with_its_text(run: Run) -> None:
    def crash(*args: Any) -> Tensor:
        raise RuntimeError("illegal memory access")

    rows = run("gated_mlp", crash, "odd sizes")
    assert failing(rows) == everywhere("odd sizes")
    assert all("illegal memory access" in row.reason for row in rows)


def test_a_loss_that_forgets_the_missed_classes_is_found(run: Run) -> None:
    def forgetful(logits: Tensor, class_ids: Tensor, target: Tensor, *rest: Any) -> Tensor:
        known = (target[:, None] == class_ids[:, :, None, None]).any(1)
        return ops.reference.upsample_bce(logits, class_ids, target.where(known, 255), *rest)

    assert everywhere("odd sizes") <= failing(run("upsample_bce", forgetful, "odd sizes", "T = K"))
