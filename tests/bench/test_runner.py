"""The runner refuses what is wrong, survives what raises, and measures what it says."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from errseg.bench import gate, official
from errseg.bench.precision import Precision
from errseg.bench.providers import find_provider
from errseg.bench.registry import Implementation, Inputs, Target, TooLarge, find_target
from errseg.bench.rows import Row
from errseg.bench.runner import QUICK, Runner
from errseg.errors import ErrSegError
from errseg.testing import PublishedDecoder, published_dense
from errseg.testing.inputs import SampleFeatures
from tests.bench.fakes import CASE, fake_target, runner, square

ALL = ("forward", "backward", "both")


def measure(target: Target, *names: str, passes: tuple[str, ...] = ALL, **effort: float) -> dict[tuple[str, str], Row]:
    rows = runner(**effort).measure(target, CASE, names, passes)
    return {(row.provider, row.passing): row for row in rows}


def test_right_providers_get_a_row_per_pass() -> None:
    rows = measure(fake_target(), "published", "reference")
    assert len(rows) == 6
    for row in rows.values():
        assert row.status == "ok" and row.rounds == 2 and row.median_ms is not None
        assert row.speedup_published and row.speedup_reference
        assert row.bytes == 2 * 192 * 4 and row.precision == "float32" and row.tf32 is False
    assert rows["published", "forward"].speedup_published == 1.0


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def unwritten(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = (x * x)[:-1]
    return out


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x * x * 1.001, "x eager"),
        (lambda x: x * float("nan"), "result"),
        (lambda x: (x * x)[:-1], "expected shape"),
        (lambda x: (x * x).double(), "expected a result in"),
        (lambda x: x.detach() * x.detach(), "does not require grad"),
        (_WrongGradient.apply, "gradients: over"),
        (unwritten, "result"),
    ],
)
def test_a_wrong_provider_is_refused_and_not_timed(run, reason: str) -> None:
    rows = measure(fake_target(eager=run), "published", "reference", "eager")
    for passing in ALL:
        wrong = rows["eager", passing]
        assert wrong.status == "failed" and wrong.reason and reason in wrong.reason
        assert wrong.median_ms is None and wrong.rounds == 0 and wrong.peak_bytes is None
        assert rows["reference", passing].status == "ok"


def test_a_wrong_yardstick_is_refused_too() -> None:
    rows = measure(fake_target(published=lambda x: x * x + 1), "published", "reference", passes=("forward",))
    assert rows["published", "forward"].status == "failed"


def test_a_provider_that_raises_is_a_failed_row() -> None:
    def raising(x: Tensor) -> Tensor:
        raise RuntimeError("no such\nkernel")

    rows = measure(fake_target(eager=raising), "published", "eager")
    assert rows["eager", "both"].reason == "RuntimeError: no such kernel"
    assert rows["published", "both"].status == "ok"


def test_what_does_not_fit_into_memory_is_no_failure() -> None:
    def prepare(inputs: Inputs) -> Inputs:
        raise TooLarge("needs 99.0 GB, 1.0 GB are free")

    target = fake_target()
    large = {"eager": lambda case: Implementation(square, prepare)}
    target = replace(target, implementations=target.implementations | large)
    rows = measure(target, "published", "eager", passes=("forward",))
    row = rows["eager", "forward"]
    assert (row.status, row.reason) == ("unavailable", "needs 99.0 GB, 1.0 GB are free")
    assert rows["published", "forward"].status == "ok"


def test_a_provider_that_raises_later_is_a_failed_row() -> None:
    calls = []

    def tiring(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 6:
            raise RuntimeError("tired")
        return x * x

    rows = measure(fake_target(eager=tiring), "published", "eager", passes=("forward",), min_rounds=5, max_rounds=5)
    assert rows["eager", "forward"].status == "failed"
    assert rows["published", "forward"].rounds == 5


def test_inputs_rotate_and_providers_take_turns() -> None:
    seen: list[tuple[str, float]] = []

    def watching(name: str):
        def run(x: Tensor) -> Tensor:
            seen.append((name, x[0, 0].item()))
            return x * x

        return run

    target = fake_target(published=watching("published"), eager=watching("eager"))
    measure(target, "published", "eager", passes=("forward",), min_rounds=6, max_rounds=6, sets=3)
    timed = seen[-14:-2]  # the last two are the memory measurements
    assert [name for name, _ in timed] == ["published", "eager"] * 6
    values = [value for name, value in timed if name == "eager"]
    assert values[:3] == values[3:] and len(set(values)) == 3
    assert [value for name, value in timed if name == "published"] == values


def test_slower_is_slower() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x * x

    rows = measure(fake_target(eager=slow), "published", "eager", passes=("forward",), min_rounds=3, max_rounds=3)
    median = rows["eager", "forward"].median_ms
    assert median is not None and 20 <= median < 60
    speedup = rows["eager", "forward"].speedup_published
    assert speedup is not None and speedup < 0.5


def test_forward_plus_backward_is_both() -> None:
    rows = measure(fake_target(), "published", min_rounds=1, max_rounds=1)
    forward_and_backward = rows["published", "both"].median_ms
    backward = rows["published", "backward"].median_ms
    assert forward_and_backward is not None and backward is not None and backward < forward_and_backward


def test_measuring_stops_in_time_but_not_before_the_fewest_rounds() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * x

    target = fake_target(published=slow)
    rows = measure(target, "published", passes=("forward",), min_rounds=5, max_rounds=50, seconds=0.0)
    assert rows["published", "forward"].rounds == 5
    rows = measure(target, "published", passes=("forward",), min_rounds=2, max_rounds=4, seconds=60.0)
    assert rows["published", "forward"].rounds == 4


def test_what_cannot_run_says_why() -> None:
    rows = measure(find_target("gated_mlp"), "cuda", "triton", "eager", "official", passes=("forward",))
    reasons = {provider: row.reason for (provider, _), row in rows.items()}
    assert {row.status for row in rows.values()} == {"unavailable"}
    assert reasons["cuda"] == "cuda does not run on cpu tensors"
    assert reasons["eager"] == "gated_mlp has no eager"
    assert reasons["official"] == "needs --official CHECKOUT"


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ErrSegError, match="no provider 'fastest'"):
        find_provider("fastest", fake_target(), "cpu", False)
    with pytest.raises(ErrSegError, match="no benchmark 'fast'"):
        find_target("fast")
    with pytest.raises(ErrSegError, match="no precision 'float8'"):
        Precision("float8")


def test_interpreted_triton_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target("class_votes")
    from errseg import ops

    monkeypatch.setattr(ops.OPS["class_votes"], "why_not", lambda *args: "interpreted")
    provider = find_provider("triton", target, "cuda", False)
    assert provider.unavailable == "interpreted Triton is not timed"


def test_float16_is_judged_by_eager_float16() -> None:
    half = replace(runner(), precision=Precision("float16"))
    rows = half.measure(fake_target(eager=lambda x: (x.float() * x.float()).half()), CASE, ["published", "eager"], ALL)
    assert {row.status for row in rows} == {"ok"}
    rows = half.measure(fake_target(eager=lambda x: (x * x).bfloat16().half()), CASE, ["published", "eager"], ALL)
    assert {row.status for row in rows if row.provider == "eager"} == {"failed"}


def test_flags_are_set_and_restored() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with Precision("autocast-bfloat16", tf32=True).active("cpu"):
        assert torch.backends.cudnn.allow_tf32 and torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert not torch.is_autocast_enabled("cpu")


def test_vanishing_gradients_are_measured_by_the_others() -> None:
    truth = {"a": torch.tensor([2.0, -4.0]).double(), "b": torch.tensor([1e-12]).double()}
    pooled = gate._pool({"a": torch.tensor([2.0, -4.0]), "b": torch.tensor([4e-7])}, truth)
    torch.testing.assert_close(pooled, torch.tensor([0.5, -1.0, 1e-7]))


@pytest.mark.parametrize("name", ["upsample_argmax", "upsample_bce", "class_votes", "spatial_attention", "train"])
def test_real_targets_pass_their_gate(name: str) -> None:
    target = find_target(name)
    quick = Runner(torch.device("cpu"), Precision("float32"), QUICK)
    names = [*(n for n in target.implementations if n != "errseg"), "reference"]
    rows = quick.measure(target, target.quick, names, target.passes)
    assert [(row.name, row.reason) for row in rows if row.status != "ok"] == []


@pytest.mark.parametrize("target", ["upsample_argmax", "class_votes", "select_classes"])
def test_integer_targets_refuse_wrong_answers(target: str) -> None:
    real = find_target(target)

    def wrong(*arguments: object) -> Tensor:
        result = real.implementations["errseg"](real.quick).run(*arguments)
        return result.roll(1, -1)

    from errseg.bench.registry import Implementation

    spoiled = replace(real, implementations={**real.implementations, "eager": lambda case: Implementation(wrong)})
    rows = runner().measure(spoiled, real.quick, ["published", "eager"], ["forward"])
    assert [row.status for row in rows] == ["ok", "failed"]


def test_square_is_what_the_fakes_compute() -> None:
    assert square(torch.tensor(3.0)) == 9


class _Official(PublishedDecoder):
    """Called as the published decoder is."""

    num_selected = 0

    def forward(self, maps, text, taps, truth):
        for tap in taps:
            tap.clamp_(-16, 16)
        torch.histc(torch.tensor([1, 2]), 2)  # as the published code does, on GPUs
        features = SampleFeatures(*reversed(taps), *maps)
        words = text[0, :, 0]
        required = None
        if truth is not None:
            required = torch.zeros(len(truth), len(words), dtype=torch.bool)
            for row, ids in zip(required, truth, strict=True):
                row[ids] = True
        found = super().forward(features, words, num_selected=self.num_selected, required=required)
        return published_dense(*found, len(words))


@pytest.mark.parametrize("name", ["head", "train"])
def test_official_is_the_decoder_of_the_checkout(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def decoder(config, num_selected):
        made = _Official(config)
        made.num_selected = num_selected
        return made

    def load(checkout):
        asked.append(checkout)
        return SimpleNamespace(decoder=decoder)

    monkeypatch.setattr(official, "_load", load)
    target = find_target(name)
    rows = replace(runner(), official=tmp_path).measure(target, target.quick, ["official", "published"], target.passes)
    assert [(row.provider, row.status, row.reason) for row in rows] == [
        ("official", "ok", None),
        ("published", "ok", None),
    ]
    assert asked == [tmp_path]
    assert find_provider("official", find_target("gated_mlp"), "cpu", True).unavailable == "gated_mlp has no official"
