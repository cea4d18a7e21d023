"""What a layer keeps for its backward pass, counted on fake tensors of the training size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from errseg import ops
from errseg.model.config import CONFIGS
from errseg.model.rrca import RRCALayer
from errseg.testing.published_decoder import AggregatorLayer

BATCH, CLASSES, SIDE = 4, 32, 40
CONFIG = CONFIGS["errseg-b"].decoder
DROP_PATH = 0.025


def saved_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages kept for the backward pass, without the module's parameters."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


@contextlib.contextmanager
def fake_bfloat16() -> Iterator[None]:
    with FakeTensorMode(), torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def test_a_fused_layer_keeps_a_fifth_of_the_published_one() -> None:
    width, hidden, heads = CONFIG.width, CONFIG.mlp_dim, CONFIG.num_heads
    with fake_bfloat16():
        x = torch.empty(BATCH, CLASSES, SIDE, SIDE, width, requires_grad=True)
        guidance, text = torch.empty(BATCH, SIDE, SIDE, width), torch.empty(BATCH, CLASSES, width)
        layer = RRCALayer(CONFIG, DROP_PATH).train()
        with ops.use_backend("cuda", "triton", "cpu", "reference"):
            fused = saved_bytes(layer, lambda: layer(x, guidance, text))

        maps = torch.empty(BATCH * CLASSES, width, SIDE, SIDE, requires_grad=True)
        published_layer = AggregatorLayer(width, heads, hidden, DROP_PATH).train()
        inputs = maps, guidance.permute(0, 3, 1, 2), text
        published = saved_bytes(published_layer, lambda: published_layer(*inputs))

    assert fused <= 270e6
    assert published >= 5 * fused
