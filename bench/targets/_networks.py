"""What head, model and train share: modules with the same random weights, counts, and the selection's gate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from errseg import ops
from errseg.bench.cases import Case, Counts
from errseg.bench.gate import Outcome, Trial, require
from errseg.bench.registry import Implementation, Inputs
from errseg.model.decoder import Decoder, published_name
from errseg.ops.class_votes import class_votes
from errseg.testing.inputs import random_decoder_weights, random_features, random_text_embeddings
from errseg.testing.published_decoder import PublishedDecoder
from errseg.testing.samples import map_tensors
from errseg.verify.checks import compare_labels

OPS = (
    *("class_votes", "select_classes", "cost_volume", "cost_embedding"),
    *("spatial_attention", "gated_mlp", "depthwise_conv", "class_attention", "upsample_residual", "up_step"),
)
# Share of the pixels whose votes rounding may move.
MOVED_PIXELS = {torch.float32: 0.005, torch.float16: 0.02, torch.bfloat16: 0.05}


def decoder(case: Case) -> Decoder:
    """This package's decoder with the case's random weights; in evaluation mode, so that no path is dropped."""
    weights = random_decoder_weights(case.decoder, seed=7)
    return Decoder.from_published(weights, num_heads=case.decoder.num_heads).eval()


def published_decoder(case: Case) -> PublishedDecoder:
    """The published order of operations with the same weights."""
    weights = random_decoder_weights(case.decoder, seed=7)
    return PublishedDecoder.from_published(weights, num_heads=case.decoder.num_heads).eval()


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of `Decoder` by published name."""
    return {published_name(name): value for name, value in module.named_parameters()}


def published_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of `PublishedDecoder`, which has the published names."""
    return dict(module.named_parameters())


def first(result: Any) -> Tensor:
    """What gradients start from: the logits or the loss, which results begin with."""
    tensor: Tensor = result[0]
    return tensor


def labels_of(logits: Tensor, class_ids: Tensor, size: tuple[int, int]) -> Tensor:
    """The label map [B, H, W] of logits."""
    labels = ops.upsample_argmax(logits, class_ids, size)
    assert isinstance(labels, Tensor)
    return labels


def feature_inputs(case: Case, seed: int) -> Inputs:
    """Features, words [T, D], K, and no class ids."""
    text = random_text_embeddings(case.words, case.decoder.text_dim, seed=0)
    features = random_features(
        case.decoder,
        case.batch,
        case.os16,
        case.os16,
        seed=seed,
        text_embeddings=text,
        num_present=min(max(case.kept, 6), case.words),
    )
    return features, text, case.kept, None


def check_logits(trial: Trial) -> Outcome:
    """Selection and logits of results that begin with (logits, class_ids, ...); returns the candidate's outcome.

    Logits are compared for the candidate's classes; where rounding or a tie made it choose others than float64 does,
    the yardsticks run once more with its choice. Inputs end with class ids, or None.
    """
    candidate, eager, truth = (trial.of(probe) for probe in (trial.candidate, trial.eager, trial.truth))
    ids = candidate.result[1]
    fixed = (*trial.inputs[:-1], ids)
    if not torch.equal(ids, truth.result[1]):
        _check_selection(trial, ids, truth.result[1])
        truth = trial.of(trial.truth, fixed)
    if not torch.equal(ids, eager.result[1]):
        eager = trial.of(trial.eager, fixed)
    trial.compare(candidate, eager, truth, of=lambda result: result[0])
    return candidate


def check_labels(trial: Trial) -> None:
    """Results (logits, class_ids, labels): logits within the budget, labels those of the candidate's own logits."""
    logits, class_ids, labels = check_logits(trial).result
    with ops.use_backend("reference"):
        exact = labels_of(logits.double(), class_ids, (labels.shape[1], labels.shape[2]))
    require(compare_labels(labels, exact, logits, class_ids))


def _check_selection(trial: Trial, got: Tensor, wanted: Tensor) -> None:
    """Classes other than float64's must have almost as many votes as its last one."""
    features, text = trial.eager.convert(trial.inputs)[:2]
    with ops.use_backend("reference"):
        votes = class_votes(features.os16_dense.double(), text.double())
    if got.shape != wanted.shape:
        raise AssertionError(f"selected {list(got.shape)} classes, expected {list(wanted.shape)}")
    pixels = features.os16_dense.shape[-2] * features.os16_dense.shape[-1]
    slack = 111 * max(1, round(MOVED_PIXELS[trial.candidate.precision.products] * pixels))  # type: ignore[union-attr]
    last = votes.gather(1, wanted).min(1).values
    short = last - votes.gather(1, got).min(1).values
    if bool((short > slack).any()):
        raise AssertionError(f"selected a class with {short.max().item()} votes too few; rounding explains {slack}")


def network_counts(
    case: Case,
    itemsize: int,
    passing: str,
    inputs: Callable[[Case, int], Inputs],
    build: Callable[[Case], Implementation],
    differentiate: Callable[[Any], Tensor],
    results: int,
) -> Counts:
    """FLOPs as PyTorch counts them over the reference; bytes: inputs, parameters and `results` elements once.

    The bytes are a lower bound that no chain of kernels reaches; products decide.
    """
    flops, elements = _count(replace(case, process_memory=False), passing, inputs, build, differentiate)
    return Counts(matmul=flops, bytes=itemsize * (elements + results))


@functools.cache
def _count(
    case: Case,
    passing: str,
    inputs: Callable[[Case, int], Inputs],
    build: Callable[[Case], Implementation],
    differentiate: Callable[[Any], Tensor],
) -> tuple[int, int]:
    """FLOPs of the pass, and elements of arguments and parameters; without computing anything."""
    implementation = build(case)
    assert implementation.module is not None
    module = implementation.module.to("meta")
    arguments: Inputs = map_tensors(inputs(case, 0), lambda t: t.to("meta"))
    elements = sum(t.numel() for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor))
    elements += sum(p.numel() for p in module.parameters())
    gradients = passing != "forward"
    # The counter does not know every fused attention.
    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_gradients}) as counter,
        sdpa_kernel(SDPBackend.MATH),
        ops.use_backend("reference"),
        torch.set_grad_enabled(gradients),
    ):
        value = implementation.run(module, *implementation.prepare(arguments))
        forward = counter.get_total_flops()
        if gradients:
            differentiate(value).sum().backward()
    return counter.get_total_flops() - (forward if passing == "backward" else 0), elements


def _of_gradients(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's gradients, from shapes: of the input and of the weight as many each as of the result.

    PyTorch's own count takes no note of groups: a depthwise weight's gradient would be C times as much as it is.
    """
    transposed, needed = rest[4], rest[7]
    return conv_flop_count(list(x), list(weight), list(grad), transposed) * sum(needed[:2])
