"""How ConvNeXt blocks are run in inference changes nothing but the time."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from errseg import create_model
from errseg.model.clip import DenseCLIP
from errseg.model.two_maps import two_maps
from errseg.testing import assert_close


@pytest.fixture(scope="module")
def clip() -> DenseCLIP:
    return create_model("errseg-tiny").clip


def plain(clip: DenseCLIP) -> DenseCLIP:
    """The same towers with timm's own MLPs."""
    from timm.layers import Mlp

    twin = copy.deepcopy(clip)
    for module in twin.modules():
        if isinstance(module, Mlp):
            module.__class__ = Mlp
    return twin


@torch.no_grad()
def test_products_by_onednn_are_those_of_timm(clip: DenseCLIP) -> None:
    image = torch.randn(2, 3, 64, 96)
    for found, wanted in zip(clip(image), plain(clip)(image), strict=True):
        assert_close(found, wanted, 2e-6)


def products(clip: DenseCLIP, image: Tensor) -> int:
    """How many of the MLPs ran through oneDNN."""
    from errseg.model.onednn_mlp import OneDNNMlp

    ran: list[bool] = []
    takes = OneDNNMlp._takes

    def recorded(self: OneDNNMlp, x: Tensor) -> bool:
        ran.append(takes(self, x))
        return ran[-1]

    with patch.object(OneDNNMlp, "_takes", recorded):
        clip(image)
    assert ran
    return sum(ran)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_runs_where_nothing_is_differentiated(clip: DenseCLIP) -> None:
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert products(clip, image) > 0
        assert products(copy.deepcopy(clip).double(), image.double()) == 0
        assert products(copy.deepcopy(clip).train(), image) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert products(clip, image) == 0
    assert products(clip, image) == 0
    clip(image).os32_dense.sum().backward()
    assert clip.visual.trunk.stages[0].blocks[0].mlp.fc1.weight.grad is not None
    clip.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((1, 1), (5, 2))])
def test_two_maps_are_one_after_the_other(clip: DenseCLIP, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    stage = copy.deepcopy(clip.visual.trunk.stages[3]).double()
    maps = [torch.randn(2, stage.blocks[0].conv_dw.in_channels, *size, dtype=torch.float64) for size in sizes]
    for found, wanted in zip(two_maps(stage.blocks, *maps), (stage.blocks(x) for x in maps), strict=True):
        assert found.shape == wanted.shape
        assert_close(found, wanted, 1e-13)


def test_training_draws_masks_for_each_map() -> None:
    """Drop path takes its own samples in either pass of stage 4, so the passes stay apart."""
    clip = create_model("errseg-tiny", drop_path=0.9).clip.train()
    with patch("errseg.model.clip.two_maps", side_effect=AssertionError), torch.no_grad():
        clip(torch.randn(1, 3, 64, 64))
