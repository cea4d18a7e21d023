"""The up-decoder's step layer by layer, as a CPU runs it, and as one op, as other devices do."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from errseg import ops
from errseg.model.decoder import Decoder, Upsampler, UpStep
from errseg.testing import assert_close
from errseg.testing.inputs import SMALL_DECODER

steps = pytest.mark.parametrize("upsample", [False, True])


def made(upsample: bool) -> tuple[UpStep, Tensor, Tensor]:
    torch.manual_seed(0)
    step = UpStep(24, 5, 16, upsample=upsample).double()
    for parameter in step.parameters():
        nn.init.normal_(parameter, std=0.5)
    size = 2 if upsample else 1
    x, guidance = torch.randn(2, 3, 5, 4, 24), torch.randn(2, 5, 5 * size, 4 * size)
    return step, x.double().requires_grad_(), guidance.double().requires_grad_()


@steps
def test_the_op_equals_the_layers_forward_and_backward(upsample: bool) -> None:
    step, x, guidance = made(upsample)
    leaves = [x, guidance, *step.parameters()]
    results = [step.by_layers(x, guidance), step.by_op(x, guidance)]
    assert results[0].shape == (2, 3, *guidance.shape[2:], 16)
    assert_close(results[1], results[0], 1e-13)
    grad = torch.randn_like(results[0])
    for got, wanted in zip(*(torch.autograd.grad(y, leaves, grad) for y in reversed(results)), strict=True):
        assert_close(got, wanted, 1e-11)


@steps
def test_the_op_runs_off_the_cpu(upsample: bool) -> None:
    step, x, guidance = made(upsample)
    with torch.no_grad(), patch.object(UpStep, "by_op", side_effect=AssertionError("the op")):
        assert step(x, guidance).shape == (2, 3, *guidance.shape[2:], 16)
        with pytest.raises(AssertionError, match="the op"):
            step(x.to("meta"), guidance.to("meta"))


def test_the_whole_up_decoder_by_ops() -> None:
    torch.manual_seed(0)
    upsampler, width = Upsampler(SMALL_DECODER).double(), SMALL_DECODER.width
    x = torch.randn(2, 3, 4, 6, width).double()
    guides = enumerate(SMALL_DECODER.decoder_guidance)
    guidance = tuple(torch.randn(2, channels, 4 << i, 6 << i).double() for i, channels in guides)
    wanted = upsampler(x, guidance)
    with patch.object(UpStep, "by_layers", UpStep.by_op):
        assert_close(upsampler(x, guidance), wanted, 1e-13)


@steps
def test_what_is_kept_composed_is_what_the_op_takes(upsample: bool) -> None:
    step, x, guidance = made(upsample)
    with torch.no_grad():
        wanted = step.by_op(x, guidance)
        step.eval().keep_folded()
        with patch.object(ops.UpStepParams, "fold", side_effect=AssertionError("folded")):
            assert torch.equal(step.by_op(x, guidance), wanted)
        step.conv1.weight.mul_(2)
        step.load_state_dict(step.state_dict())
        assert not torch.equal(step.by_op(x, guidance), wanted)


def test_a_decoder_keeps_its_steps_composed() -> None:
    decoder = Decoder(SMALL_DECODER)
    decoder.keep_folded()
    assert all(step.place is not None for step in decoder.upsampler.steps)
