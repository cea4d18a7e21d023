"""The run as a whole: what it covers, what it skips and says so, when it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errseg import ops, verify
from errseg.errors import ErrSegError
from errseg.testing.samples import Sizes
from errseg.verify import cases as grid
from errseg.verify import golden, runner, yardstick
from errseg.verify.rows import FAILED, NOT_RUN, PASSED, Row

CPU = torch.device("cpu")


def test_the_grid_covers_every_op_and_habit() -> None:
    assert set(grid.BATCHED) == set(ops.OPS)
    for op in ops.OPS:
        names = {case.name for case in grid.cases(op, quick=True)}
        assert {"odd sizes", "one class", "one pixel", "empty batch", "past a tile"} <= names
        assert {f"{view} views" for view in ("strided", "transposed", "expanded")} <= names
    for op in grid.WITH_DROP_PATH:
        views = [case for case in grid.cases(op, quick=True) if case.view and case.drop_path]
        assert {case.view for case in views} == {"strided", "transposed"}
    assert "T < K" in {case.name for case in grid.cases("select_classes", quick=True)}
    assert "all ignored" in {case.name for case in grid.cases("upsample_bce", quick=True)}


def test_the_full_grid_has_the_published_sizes() -> None:
    for op in ops.OPS:
        real = [case for case in grid.cases(op, quick=False) if case.real and case.sizes.words <= 100_000]
        heights = {case.sizes.height for case in real}
        assert heights in ({40, 48}, {160, 192}, {40, 48, 80, 96})
        assert {case.sizes.classes for case in real} >= ({16, 24, 32, 48} if op != "class_votes" else {48})
    words = {case.sizes.words for case in grid.cases("class_votes", quick=False) if case.real}
    assert words >= {20, 59, 150, 459, 847, 100_000}
    sizes = {case.call().args[2] for case in grid.cases("upsample_argmax", quick=False)[-2:]}
    assert sizes == {(480, 640), (512, 683)}


def test_views_hold_the_values_and_reach_gradients() -> None:
    for case in grid.cases("class_attention", quick=True):
        if case.view:
            call = case.call()
            viewed = case.arrange(call)
            assert any(not t.is_contiguous() for t in viewed.leaves())
            assert [t.shape for t in viewed.leaves()] == [t.shape for t in call.leaves()]
    assert yardstick.leaf_names(call)[:3] == ["x", "text_guidance", "norm_weight"]
    assert "mlp.fc1_weight" in yardstick.leaf_names(call)


@pytest.mark.parametrize("op", ["cost_volume", "select_classes", "class_votes"])
def test_the_reference_passes(op: str) -> None:
    rows = verify.run(quick=True, ops=[op], backends=["reference"])
    assert verify.succeeded(rows) and {row.status for row in rows} == {PASSED}
    dtypes = {row.dtype for row in rows}
    assert dtypes == ({"int64"} if op == "select_classes" else {"float64", "float32", "bfloat16", "float16"})


def test_progress_tells_what_comes() -> None:
    told: list[tuple[int, int, str]] = []
    verify.run(quick=True, ops=["select_classes"], backends=["reference"], progress=lambda *now: told.append(now))
    assert told[0][2] == "select_classes: odd sizes"
    assert [done for done, _, _ in told] == list(range(told[0][1] + 1))


def test_cases_are_chosen_by_their_names_and_their_rows_told_at_once() -> None:
    told: list[Row] = []
    rows = verify.run(quick=True, only=["one pixel", "eval_odd"], backends=["reference"], on_row=told.append)
    assert told == rows and {row.case for row in rows} == {"one pixel", "eval_odd"}
    assert {row.op for row in rows} == {*ops.OPS, "golden"}
    with pytest.raises(ErrSegError, match="no case has 'two pixels' in its name: one is 'golden: "):
        verify.run(quick=True, only=["two pixels"])


def test_a_backend_that_was_asked_for_and_cannot_run_fails() -> None:
    rows = verify.run(quick=True, ops=["class_votes"], backends=["cuda"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not verify.succeeded(rows)
    assert "nothing was executed" in rows[-1].reason and rows[-1].status == FAILED


def test_nothing_executed_is_no_success() -> None:
    assert not verify.succeeded([])
    assert not verify.succeeded([Row("gated_mlp", "cuda", "float32", "odd sizes", reason="no GPU")])


def test_a_backend_that_refuses_every_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = dataclasses.replace(ops.OPS["gated_mlp"].backends["reference"], can_run=lambda *args: "only on Sundays")
    monkeypatch.setitem(ops.OPS["gated_mlp"].backends, "reference", backend)
    rows = verify.run(quick=True, ops=["gated_mlp"], backends=["reference"])
    assert [row.status for row in rows if row.crashed] == [FAILED]
    assert "only on Sundays" in rows[-1].reason


def test_sizes_beyond_the_memory_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "free_gigabytes", lambda device: 1.0)
    case = next(case for case in grid.cases("upsample_bce", quick=False) if case.sizes.words == 100_000)
    rows = runner.run_case(case, ["reference"], CPU)
    assert {row.status for row in rows} == {NOT_RUN}
    assert rows[0].reason.startswith("needs ") and rows[0].reason.endswith("GB, 1.0 GB are free")


def test_interpreted_kernels_are_labelled_and_spared_the_real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = ops.OPS["gated_mlp"].backends["reference"]
    interpreted = dataclasses.replace(reference, available=lambda: "interpreted")
    monkeypatch.setitem(ops.OPS["gated_mlp"].backends, "reference", interpreted)
    small = grid.Case("gated_mlp", "odd sizes", Sizes())
    by_dtype = {row.dtype: row for row in runner.run_case(small, ["reference"], CPU)}
    assert by_dtype["float32"].label == "reference (interpreted)" and by_dtype["float32"].status == PASSED
    assert by_dtype["bfloat16"].status == NOT_RUN and "interpreted" in by_dtype["bfloat16"].reason
    real = dataclasses.replace(small, real=True)
    assert {row.status for row in runner.run_case(real, ["reference"], CPU)} == {NOT_RUN}


@pytest.mark.parametrize("wrong", [{"ops": ["softmax"]}, {"backends": ["tpu"]}, {"device": "abacus"}])
def test_wrong_names_are_told(wrong: dict) -> None:
    with pytest.raises(ErrSegError, match=r"softmax|tpu|abacus"):
        verify.run(quick=True, **wrong)


def test_golden_numbers_pass_and_fail() -> None:
    tasks = golden.golden_tasks(["reference"], CPU, quick=True)
    assert "golden: training step" in dict(tasks)
    odd = next(task for text, task in tasks if text == "golden: eval_odd")  # in float64
    (row,) = odd()
    assert row.status == PASSED, row
    with pytest.MonkeyPatch.context() as patch:
        load = golden._load
        shifted = {"eval_odd": {k: 1.0001 * v if k == "logits" else v for k, v in load("eval_odd").items()}}
        patch.setattr(golden, "_load", lambda name: shifted.get(name) or load(name))
        (row,) = odd()
    assert row.status == FAILED and row.worst and row.worst.quantity == "logits"


def test_json_rows_hold_plain_numbers() -> None:
    rows = verify.run(quick=True, ops=["cost_volume"], backends=["reference"])
    line = json.loads(json.dumps(rows[0].to_dict(), allow_nan=False))
    assert line["op"] == "cost_volume" and line["status"] == "pass" and line["device"] == "cpu"
    assert {"quantity", "measure", "error", "allowed", "eager", "passed"} <= set(line["checks"][0])


def test_importing_it_imports_neither_pytest_nor_triton() -> None:
    code = (
        "import sys, errseg.verify; print([m for m in ('pytest', 'triton', 'open_clip', 'rich') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
