"""The in-house yardstick against the numbers of the published implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.testing import compare
from errseg.testing.inputs import SMALL_DECODER, SampleFeatures, random_decoder_weights, random_tensor
from errseg.testing.published_decoder import (
    DropPath,
    PublishedDecoder,
    published_cost_volume,
    published_dense,
    published_labels,
    published_loss,
    published_selection,
    published_votes,
    trace_intermediates,
)

Golden = Callable[[str], dict[str, Tensor]]
CASES = {
    "small": ("eval_small_io", "eval_small_layers", "eval_small_layers1", "eval_small_up"),
    "nonsquare": ("eval_nonsquare",),
    "odd": ("eval_odd",),
}
VANISHING = ("attention.k.bias", "attention.norm_k.bias")  # gradients that are zero in exact arithmetic


def load_case(golden: Golden, case: str) -> dict[str, Tensor]:
    return {name: tensor for file in CASES[case] for name, tensor in golden(file).items()}


def features_of(values: dict[str, Tensor], dtype: torch.dtype) -> SampleFeatures:
    names = ("os4", "os8", "os16", "os32", "feat_os16", "feat_os32")
    return SampleFeatures(*(values[f"in.{name}"].to(dtype) for name in names))


def decoder_of(golden: Golden, dtype: torch.dtype, drop_path_rate: float = 0.025) -> PublishedDecoder:
    weights = {name: tensor.to(dtype) for name, tensor in golden("weights").items()}
    return PublishedDecoder.from_published(weights, drop_path_rate=drop_path_rate).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "intermediate", "final"), [(torch.float64, 6e-8, 1e-12), (torch.float32, 5e-6, 5e-6)]
)
def test_every_intermediate(golden: Golden, case: str, dtype: torch.dtype, intermediate: float, final: float) -> None:
    values = load_case(golden, case)
    text = values["in.text"][:, 0].to(dtype)
    features = features_of(values, dtype)
    with torch.no_grad():
        found = trace_intermediates(decoder_of(golden, dtype), features, text, values["indices"])
    logits = found.pop("logits")
    assert len(found) == 17
    for name, value in found.items():  # stored as float32
        compare.assert_close(value, values[name], intermediate, name)
    compare.assert_close(logits, values["logits"], final, "logits")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_costs_votes_selection(golden: Golden, case: str, dtype: torch.dtype) -> None:
    values = load_case(golden, case)
    features, text = features_of(values, dtype), values["in.text"][:, 0].to(dtype)
    cost16 = published_cost_volume(features.os16_dense, text)
    cost32 = published_cost_volume(features.os32_dense, text)
    compare.assert_close(cost16, values["cost_all_os16"], 5e-7, "cost_all_os16")
    gathered = torch.stack([cost[ids] for cost, ids in zip(cost32, values["indices"], strict=True)])
    compare.assert_close(gathered, values["cost_os32"], 5e-7, "cost_os32")
    votes = published_votes(cost16)
    assert torch.equal(votes, values["votes"])
    num_selected = values["indices"].shape[1]
    with torch.no_grad():
        output = decoder_of(golden, dtype)(features, text, num_selected=num_selected)
    order = values["indices"].sort(dim=1)
    assert torch.equal(output.class_ids, order.values)
    logits = torch.stack([x[i] for x, i in zip(values["logits"], order.indices, strict=True)])
    compare.assert_close(output.logits, logits, 5e-6, "logits in ascending order")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_label_map(golden: Golden, case: str, dtype: torch.dtype) -> None:
    values = load_case(golden, case)
    size = (values["pred"].shape[0], values["pred"].shape[1])
    dense = published_dense(values["logits"].to(dtype), values["indices"], len(values["in.text"]))
    labels = published_labels(dense, size)[0]
    compare.assert_labels_equal_except_ties(labels, values["pred"], values["pred_margin"], 1e-6, 0.99)


@pytest.mark.parametrize("mode", ["autocast", "module"])
def test_bfloat16_errs_as_much_as_the_published_code(golden: Golden, mode: str) -> None:
    # The published code under bfloat16 autocast: largest error 0.047, rms 0.0097.
    values = load_case(golden, "small")
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    features, text = features_of(values, dtype), values["in.text"][:, 0].to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = decoder_of(golden, dtype)(features, text, num_selected=7, class_ids=values["indices"])
    assert output.logits.dtype == torch.bfloat16
    error = (output.logits.double() - values["logits"]).abs()
    assert 0.02 < error.max() < 0.08
    assert 0.005 < error.square().mean().sqrt() < 0.015


def test_training_gradients(golden: Golden) -> None:
    values = golden("train_small_io")
    decoder = decoder_of(golden, torch.float64, drop_path_rate=0.0).train()
    leaves = {name: tensor.double().requires_grad_() for name, tensor in values.items() if name.startswith("in.")}
    required = torch.zeros(2, 21, dtype=torch.bool)
    required[0, values["gt0"]] = True
    required[1, values["gt1"]] = True
    output = decoder(features_of(leaves, torch.float64), leaves["in.text"][:, 0], num_selected=7, required=required)
    order = values["indices"].sort(dim=1)
    assert torch.equal(output.class_ids, order.values)
    output.logits.retain_grad()
    loss = published_loss(published_dense(output.logits, output.class_ids, 21), values["targets"])
    loss.backward()
    compare.assert_close(loss, values["loss"], 1e-12, "loss")
    ascending = torch.stack([g[i] for g, i in zip(values["grad.logits"], order.indices, strict=True)])
    compare.assert_close(output.logits.grad, ascending, 1e-10, "grad.logits")
    for name, leaf in leaves.items():
        key = name.replace("in.", "grad.")
        compare.assert_close(leaf.grad, values[key], 1e-10, key)
    gradients = golden("train_small_grads0") | golden("train_small_grads1")
    parameters = dict(decoder.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, parameter in parameters.items():
        if name.endswith(VANISHING):
            compare.assert_absolutely_close(parameter.grad, torch.zeros_like(parameter), 1e-12, name)
        else:
            compare.assert_close(parameter.grad, gradients[name], 1e-10, name)


def test_loss_and_labels_alone(golden: Golden) -> None:
    values = golden("loss_post")
    logits = values["loss.logits"].double().requires_grad_()
    loss = published_loss(published_dense(logits, values["loss.indices"], 12), values["loss.targets"])
    loss.backward()
    compare.assert_close(loss, values["loss.value"], 1e-12, "loss")
    compare.assert_close(logits.grad, values["loss.grad_logits"], 1e-12, "gradient")
    labels = published_labels(published_dense(values["post.logits"], values["post.indices"], 12), (23, 31))
    assert torch.equal(labels[0], values["post.pred"])  # saturated ties included


@pytest.mark.parametrize("case", ["a", "few", "tiny", "two"])
def test_selection_with_ties(golden: Golden, case: str) -> None:
    values = golden("selection")
    votes = published_votes(values[f"{case}.cost"])
    assert torch.equal(votes, values[f"{case}.votes"])
    chosen = published_selection(votes, values[f"{case}.selection"].shape[1])
    assert torch.equal(chosen, values[f"{case}.selection"])


def test_equal_cosines_rank_the_lowest_id_first() -> None:
    cost = torch.full((1, 5, 2, 3), 0.5)
    assert published_votes(cost).tolist() == [[600, 60, 6, 0, 0]]


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ([7], [2, 5, 7]),  # 9 falls out whatever its votes
        ([], [2, 5, 9]),
        ([9], [2, 5, 9]),
        ([0, 1, 3, 4], [0, 1, 3]),  # the highest ground-truth id falls out
    ],
)
def test_required_classes_come_first(truth: list[int], expected: list[int]) -> None:
    votes = torch.zeros(1, 12, dtype=torch.int64)
    votes[0, [2, 5, 9]] = torch.tensor([10, 20, 1000])
    required = torch.zeros(1, 12, dtype=torch.bool)
    required[0, truth] = True
    assert published_selection(votes, 3, required).tolist() == [expected]


def test_selection_of_a_small_vocabulary_and_bad_arguments() -> None:
    votes = torch.tensor([[5, 0, 7]])
    assert published_selection(votes, 48).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="num_selected"):
        published_selection(votes, 0)
    with pytest.raises(ValueError, match=r"expected required \[1, 3\] bool, got \[1, 4\]"):
        published_selection(votes, 2, torch.zeros(1, 4, dtype=torch.bool))


def test_from_published_takes_a_prefix_and_copies() -> None:
    weights = random_decoder_weights(SMALL_DECODER, seed=1, prefix="sem_seg_head.decoder.")
    decoder = PublishedDecoder.from_published(
        weights | {"sem_seg_head.other": torch.zeros(1)}, prefix="sem_seg_head.decoder."
    )
    assert decoder.config == SMALL_DECODER
    before = decoder.head.weight.clone()
    weights["sem_seg_head.decoder.head.weight"].zero_()
    assert torch.equal(decoder.head.weight, before)
    assert all(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("name", ["head.bias", "up_decoder1.textual_fusion.0.weight"])
def test_from_published_names_what_is_wrong(name: str) -> None:
    weights = random_decoder_weights(SMALL_DECODER, seed=1)
    with pytest.raises(ErrSegError, match=name):
        PublishedDecoder.from_published({key: t for key, t in weights.items() if key != name})
    with pytest.raises(ErrSegError, match=r"extra\.weight"):
        PublishedDecoder.from_published(weights | {"extra.weight": torch.zeros(2)})
    with pytest.raises(ErrSegError, match=r"head\.bias"):
        PublishedDecoder.from_published(weights | {"head.bias": torch.zeros(2)})
    with pytest.raises(ErrSegError, match="not the weights"):
        PublishedDecoder.from_published({})


@pytest.mark.parametrize("model", ["errseg_b", "errseg_l"])
def test_names_and_shapes_of_the_published_checkpoints(model: str) -> None:
    from errseg.model.config import CONFIGS

    table = {}
    for line in (Path(__file__).parents[1] / f"golden/keys/{model}.tsv").read_text().splitlines():
        name, shape = line.split("\t")
        if name.startswith("sem_seg_head.decoder."):
            table[name.removeprefix("sem_seg_head.decoder.")] = json.loads(shape)
    assert len(table) == 230
    with torch.device("meta"):
        decoder = PublishedDecoder(CONFIGS[model.replace("_", "-")].decoder)
    assert {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()} == table


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    drop = DropPath(0.25)
    x = torch.ones(4000, 3, 5)
    dropped = drop(x)
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert set(per_sample[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 0.05  # 4.3 standard deviations
    assert torch.equal(drop.eval()(x), x)
    layers = PublishedDecoder(SMALL_DECODER).aggregator_layers
    rates = [layer.spatial_fusion["sa"].drop_path.drop_prob for layer in layers]
    assert rates == [0.0, 0.025]


def test_text_of_another_width_is_refused(golden: Golden) -> None:
    features = features_of(golden("eval_odd"), torch.float32)
    with pytest.raises(ValueError, match=r"expected text_embeddings \[T, 40\], got \[9, 41\]"):
        decoder_of(golden, torch.float32)(features, random_tensor(9, 41, seed=0), num_selected=4)
