"""What the files of the ops share: cases, published layouts, published modules with given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from errseg.bench.cases import Case, vary
from errseg.bench.registry import Inputs
from errseg.testing.samples import Sizes, sample

EVAL_B = Case()
EVAL_L = Case(model="l", size=768)
TRAIN = Case(classes=32, words=171)
SMALL = Case(model="small", classes=5, words=11, size=96)

K_AXIS = (16, 24, 32)
T_AXIS = (20, 59, 150, 459)
B_AXIS = (2, 4, 8)
SIZE_AXIS = (320, 480, 768)

OVER_CLASSES = (*vary(EVAL_B, classes=K_AXIS, batch=B_AXIS, size=SIZE_AXIS), EVAL_L)


def sample_inputs(op: str) -> Callable[[Case, int], Inputs]:
    """Arguments of an op as the tests draw them, at the sizes of a case."""

    def inputs(case: Case, seed: int) -> Inputs:
        config = case.decoder
        sizes = Sizes(
            batch=case.batch,
            classes=case.kept,
            words=case.words,
            height=case.os16,
            width=case.os16,
            channels=config.width,
            heads=config.num_heads,
            hidden=config.mlp_dim,
            embed=config.embed_dim,
            text=config.text_dim,
        )
        return sample(op, sizes, seed=seed).map(lambda t: t.float() if t.is_floating_point() else t).args

    return inputs


def with_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with these very tensors for parameters, so that gradients reach them."""
    known = dict(module.named_parameters())
    if known.keys() != tensors.keys():
        raise ValueError(f"expected the parameters {sorted(known)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if known[name].shape != tensor.shape:
            raise ValueError(f"expected {name} {list(known[name].shape)}, got {list(tensor.shape)}")
        owner, _, own_name = name.rpartition(".")
        parameters: dict[str, Any] = module.get_submodule(owner)._parameters
        parameters[own_name] = tensor
    return module


def norm_and_layers(params: Any, norm: str, inside: str, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A params dataclass under module names: `norm_*` goes to `norm`, `<layer>_*` to `<inside><layer>.*`."""
    found = {}
    for name in params.__dataclass_fields__:
        if name not in skip:
            layer, _, kind = name.rpartition("_")
            found[f"{norm}.{kind}" if layer == "norm" else f"{inside}{layer}.{kind}"] = getattr(params, name)
    return found
