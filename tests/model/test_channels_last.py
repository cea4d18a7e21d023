"""The up-decoder's layers as a CPU runs them are the modules they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from errseg.model.channels_last import conv_norm_relu, double_size, one_channel
from errseg.model.decoder import CLASSES_AT_ONCE, Upsampler
from errseg.testing import assert_close
from errseg.testing.compare import rms_error
from errseg.testing.inputs import SMALL_DECODER
from errseg.testing.memory import assert_no_allocation_larger_than


class ConvNorm(nn.Module):
    """A convolution, something added for each image, GroupNorm, ReLU; in the plain order."""

    def __init__(self, channels: int = 16, images: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.added = nn.Parameter(torch.randn(images, channels, 5, 7)) if images else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.added is not None:
            y = y + self.added.repeat_interleave(len(y) // len(self.added), 0)
        return self.norm(y).relu()


def fused(layer: ConvNorm, x: Tensor) -> Tensor:
    return conv_norm_relu(x, layer.conv.weight, layer.norm, layer.added)


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


CASES: dict[str, tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "double size": (nn.ConvTranspose2d(16, 8, 2, stride=2), double_size, plainly),
    "same size": (nn.Conv2d(16, 8, 1), double_size, plainly),
    "one channel": (nn.Conv2d(16, 1, 1), one_channel, lambda layer, x: layer(x)[:, 0]),
    "norm": (ConvNorm(), fused, plainly),
    "norm of a sum": (ConvNorm(24, images=2), fused, plainly),
}


def answers(layer: nn.Module, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of every parameter behind an uneven cotangent."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = call(layer, leaf)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(result.shape, generator=generator).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, [leaf, *layer.parameters()], cotangent)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_module_forward_and_backward(case: str, layout: torch.memory_format) -> None:
    layer, call, plain = CASES[case]
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = (2 + torch.randn(4, 16, 5, 7, dtype=torch.float64)).contiguous(memory_format=layout)
    for got, wanted in zip(answers(layer, call, x), answers(layer, plain, x), strict=True):
        assert_close(got, wanted, 1e-12)


def test_half_precision_takes_the_modules() -> None:
    x = torch.randn(4, 16, 5, 7)
    for layer, call, plain in CASES.values():
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = call(layer.float(), x), plain(layer, x)
        assert got.dtype == wanted.dtype and (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
        assert call(layer.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("mean", [0, 10])  # in units of the spread
def test_large_maps_are_as_exact_as_the_module_on_contiguous_ones(mean: int) -> None:
    layer, exact = ConvNorm(), ConvNorm().double()
    nn.init.dirac_(layer.conv.weight)
    exact.load_state_dict(layer.state_dict())
    x = mean + torch.randn(2, 16, 160, 160)
    truths = answers(exact, plainly, x.double())
    mine = answers(layer, fused, x.contiguous(memory_format=torch.channels_last))
    for got, theirs, truth in zip(mine, answers(layer, plainly, x), truths, strict=True):
        assert rms_error(got, truth) < 3 * rms_error(theirs, truth)


def test_classes_go_through_the_up_decoder_few_at_a_time() -> None:
    """In inference; the largest map is one of a few classes, and the logits are those of all at once."""
    torch.manual_seed(0)
    upsampler = Upsampler(SMALL_DECODER)
    classes = 2 * CLASSES_AT_ONCE + 3
    x = torch.randn(2, classes, 4, 6, SMALL_DECODER.width)
    widths = SMALL_DECODER.decoder_guidance
    guidance = tuple(torch.randn(2, width, 4 << i, 6 << i) for i, width in enumerate(widths))
    whole = upsampler(x, guidance)
    largest = 4 * 2 * CLASSES_AT_ONCE * 16 * 24 * max(SMALL_DECODER.decoder_dims)
    with torch.no_grad(), assert_no_allocation_larger_than(largest):
        assert_close(upsampler(x, guidance), whole, 1e-6)
