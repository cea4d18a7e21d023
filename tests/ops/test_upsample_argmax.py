"""Label maps: golden labels, the tie rule, scores, groups of classes, memory."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from errseg import ops
from errseg.testing import AllocationSpy, assert_close, assert_labels_equal_except_ties
from errseg.testing.samples import Sizes, sample
from tests.ops.cases import HALF, interpreted, on_backends

backends = on_backends("upsample_argmax")
reference = import_module("errseg.ops.reference.upsample_argmax")


@backends
def test_golden_labels(golden, backend: str) -> None:
    g = golden("loss_post")
    labels = ops.upsample_argmax(g["post.logits"], g["post.indices"], (23, 31), backend=backend)
    # Saturated logits tie at probability one, so a margin of zero is compared too: the lowest id wins.
    exact = g["post.prob_margin"] == 0
    assert exact.any() and torch.equal(labels[0][exact], g["post.pred"][exact])
    assert_labels_equal_except_ties(labels[0], g["post.pred"], g["post.prob_margin"], 1e-6)


@backends
@pytest.mark.parametrize("name", ["eval_small_io", "eval_nonsquare", "eval_odd"])
def test_golden_predictions(golden, name: str, backend: str) -> None:
    g = golden(name)
    size = tuple(g["pred"].shape)
    labels = ops.upsample_argmax(g["logits"][:1].float(), g["indices"][:1], size, backend=backend)
    assert_labels_equal_except_ties(labels[0], g["pred"], g["pred_margin"], 1e-6)


@backends
@pytest.mark.parametrize("group", [1, 2, 5, 100])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(batch=1, classes=1, height=1, width=1)])
def test_equals_the_dense_argmax(sizes: Sizes, group: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = sample("upsample_argmax", sizes).to(torch.float32)
    logits, ids, size = call.args
    monkeypatch.setattr(reference, "GROUP_ELEMENTS", group * logits.shape[0] * size[0] * size[1])
    probabilities = F.interpolate(logits.sigmoid(), size=size, mode="bilinear", align_corners=False)
    labels, scores = call(backend=backend)
    assert labels.dtype == torch.int32 and scores.dtype == torch.float32
    assert torch.equal(labels.long(), ids.gather(1, probabilities.argmax(1).flatten(1)).view_as(labels))
    assert_close(scores, probabilities.amax(1), 1e-6)


@backends
@pytest.mark.parametrize("group", [1, 100])
def test_labels_alone_are_the_same(group: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = sample("upsample_argmax").to(torch.float32)
    logits, ids, size = call.args
    monkeypatch.setattr(reference, "GROUP_ELEMENTS", group * logits.shape[0] * size[0] * size[1])
    labels, scores = ops.OPS["upsample_argmax"](logits, ids, *size, False, backend=backend)
    assert torch.equal(labels, call(backend=backend)[0])
    assert scores.shape == (0,) and scores.dtype == torch.float32


@pytest.mark.parametrize("return_scores", [True, False])
def test_fake_foretells_whether_there_are_scores(return_scores: bool) -> None:
    op, (logits, ids, size) = ops.OPS["upsample_argmax"], sample("upsample_argmax").args
    for made, foretold in zip(
        op(logits, ids, *size, return_scores), op.fake(logits, ids, *size, return_scores), strict=True
    ):
        assert (made.shape, made.dtype) == (foretold.shape, foretold.dtype)


@backends
@pytest.mark.parametrize("group", [1, 2, 100])
def test_ties_go_to_the_lowest_id_in_any_order(group: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GROUP_ELEMENTS", group * 12 * 13)
    logits = torch.full((1, 4, 3, 4), 2.0)
    ids = torch.tensor([[9, 3, 7, 5]])
    assert ops.upsample_argmax(logits, ids, (12, 13), backend=backend).unique().tolist() == [3]
    logits[0, 2] = 40.0  # saturated: probability one
    logits[0, 0] = 30.0  # as well
    assert ops.upsample_argmax(logits, ids, (12, 13), backend=backend).unique().tolist() == [7]


@on_backends("upsample_argmax", without=("reference",))  # PyTorch's vector loops round their remainders differently
@pytest.mark.parametrize("classes", [2, 12, 17])
@pytest.mark.parametrize("size", [(22, 35), (90, 70)])
def test_equal_maps_tie_wherever_they_stand(classes: int, size: tuple[int, int], backend: str) -> None:
    logits = torch.randn(1, 1, 7, 9).repeat(1, classes, 1, 1)
    labels = ops.upsample_argmax(logits, 3 + torch.arange(classes)[None], size, backend=backend)
    assert labels.unique().tolist() == [3]


@backends
@pytest.mark.parametrize("size", [(1, 1), (3, 4), (2, 9), (50, 31), (9, 131)])
def test_shrinks_and_grows_to_any_size(size: tuple[int, int], backend: str) -> None:
    logits, ids, _ = sample("upsample_argmax").args
    probabilities = F.interpolate(logits.sigmoid(), size=size, mode="bilinear", align_corners=False)
    labels = ops.upsample_argmax(logits, ids, size, backend=backend)
    assert torch.equal(labels.long(), ids.gather(1, probabilities.argmax(1).flatten(1)).view_as(labels))


@backends
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_logits_get_float32_probabilities(dtype: torch.dtype, backend: str) -> None:
    call = sample("upsample_argmax").to(dtype)
    labels, scores = call(backend=backend)
    wanted = call.to(torch.float32)(backend=backend)
    assert torch.equal(labels, wanted[0]) and torch.equal(scores, wanted[1])


@backends
def test_very_negative_logits_give_the_lowest_selected_id(backend: str) -> None:
    ids = torch.tensor([[4, 8]])
    assert ops.upsample_argmax(torch.full((1, 2, 2, 2), -200.0), ids, (4, 4), backend=backend).unique() == 4


@backends
def test_memory_is_a_few_label_maps(backend: str) -> None:
    classes, side, size = (12, 10, (60, 300)) if interpreted("upsample_argmax", backend) else (48, 40, (800, 4000))
    logits, ids = torch.randn(1, classes, side, side), torch.arange(classes)[None]
    with AllocationSpy() as spy:
        labels = ops.upsample_argmax(logits, ids, size, backend=backend)
    # All classes at once would be `classes` label maps.
    assert isinstance(labels, torch.Tensor)
    assert spy.peak_bytes < classes / 4 * labels.nbytes
    if backend == "cpu":
        assert spy.peak_bytes <= labels.nbytes  # no scores: they were not asked for


def test_wrong_arguments_are_named() -> None:
    logits, ids, _ = sample("upsample_argmax").args
    with pytest.raises(ValueError, match=r"class_ids \[2, 5\] int64, got \[2, 4\] int64"):
        ops.upsample_argmax(logits, ids[:, :4], (8, 8))
    with pytest.raises(ValueError, match=r"size \(H, W\) of at least 1 x 1, got \(0, 8\)"):
        ops.upsample_argmax(logits, ids, (0, 8))
    with pytest.raises(ValueError, match="at least one class"):
        ops.upsample_argmax(logits[:, :0], ids[:, :0], (8, 8))
