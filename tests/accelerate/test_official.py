"""The published modules themselves, accelerated and restored; ERRSEG_OFFICIAL names a checkout of their code."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import errseg
from errseg import verify
from errseg.model.decoder import Upsampler
from errseg.verify.checkout import load_official
from errseg.verify.official_settings import SMALL, decoder_inputs, decoder_weights

pytestmark = pytest.mark.skipif("ERRSEG_OFFICIAL" not in os.environ, reason="ERRSEG_OFFICIAL names no checkout")


def decoder() -> Any:
    made = load_official(Path(os.environ["ERRSEG_OFFICIAL"])).decoder(SMALL.decoder, SMALL.num_selected)
    made.load_state_dict(decoder_weights(SMALL, torch.float32, torch.device("cpu")))
    return made.eval()


def run(module: Any) -> Tensor:
    features, text = decoder_inputs(SMALL, torch.float32, torch.device("cpu"))
    os4, os8, os16, os32, *dense = (t.clone() for t in features)
    torch.manual_seed(0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        histogram = torch.histc  # counts floats alone on a CPU
        patch.setattr(torch, "histc", lambda x, *args, **kwargs: histogram(x.float(), *args, **kwargs))
        return module(dense, text[None, :, None].repeat(SMALL.batch, 1, 1, 1), [os32, os16, os8, os4], None)


def test_loss_gradients_and_scores_of_the_whole_model_agree() -> None:
    rows = verify.run(quick=True, official=os.environ["ERRSEG_OFFICIAL"], only=["accelerate"])
    assert len(rows) == 4 and [row.status for row in rows] == 4 * ["pass"], [str(row.worst) for row in rows]


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_a_little_off_fails(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Upsampler.forward
    monkeypatch.setattr(Upsampler, "forward", lambda *args: 1.0001 * forward(*args))
    rows = verify.run(quick=True, official=os.environ["ERRSEG_OFFICIAL"], only=[f"accelerate, {part}"])
    assert [row.status for row in rows] == ["fail", "fail"]


def test_the_decoder_keeps_parameters_and_answers_to_the_bit_when_restored() -> None:
    module = decoder()
    wanted, parameters = run(module), list(module.named_parameters())
    got = run(errseg.accelerate(module))
    assert (got - wanted).abs().max() < 1e-3 and not got.equal(wanted)
    assert all(a is b and n == m for (n, a), (m, b) in zip(module.named_parameters(), parameters, strict=True))
    twin = copy.deepcopy(module).double()
    assert run(module).equal(got) and next(twin.parameters()).dtype == torch.float64
    assert run(errseg.restore(module)).equal(wanted)
