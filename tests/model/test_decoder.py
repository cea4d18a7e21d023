"""The decoder against the published numbers: every precision, every intermediate choice, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errseg import Decoder, DenseFeatures, ErrSegError, ops
from errseg.model.config import CONFIGS
from errseg.model.decoder import Upsampler, published_name
from errseg.testing import (
    AllocationSpy,
    PublishedDecoder,
    assert_absolutely_close,
    assert_close,
    assert_labels_equal_except_ties,
    forbid_host_syncs,
)
from errseg.testing.compare import rms_error

CASES = ("eval_small_io", "eval_nonsquare", "eval_odd")
INPUTS = ("os4", "os8", "os16", "os32", "feat_os16", "feat_os32")


def inputs(g: dict[str, Tensor], dtype: torch.dtype) -> tuple[DenseFeatures, Tensor]:
    return DenseFeatures(*(g[f"in.{name}"].to(dtype) for name in INPUTS)), g["in.text"][:, 0].to(dtype)


def decoder_of(golden, dtype: torch.dtype) -> Decoder:
    return Decoder.from_published({k: v.to(dtype) for k, v in golden("weights").items()}).eval()


def by_ascending_id(g: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids, order = g["indices"].sort(1)
    return ids, torch.stack([logits[o] for logits, o in zip(g["logits"], order, strict=True)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_golden_logits(golden, case: str, dtype: torch.dtype, tolerance: float) -> None:
    g = golden(case)
    ids, logits = by_ascending_id(g)
    features, text = inputs(g, dtype)
    with torch.no_grad():
        output = decoder_of(golden, dtype)(features, text, num_selected=ids.shape[1])
    assert torch.equal(ops.class_votes(features.os16_dense, text), g["votes"])
    assert torch.equal(output.class_ids, ids)
    assert_close(output.logits, logits, tolerance)
    labels = ops.upsample_argmax(output.logits, output.class_ids, tuple(g["pred"].shape))
    assert_labels_equal_except_ties(labels[0], g["pred"], g["pred_margin"], 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_at_most_twice_as_much_as_the_published_code(golden, case: str, autocast: bool) -> None:
    g = golden(case)
    ids, logits = by_ascending_id(g)
    dtype = torch.float32 if autocast else torch.bfloat16
    decoder = decoder_of(golden, torch.float32).to(dtype)
    features, text = inputs(g, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = decoder(features, text, num_selected=ids.shape[1], class_ids=ids)
    error = output.logits.double() - logits
    # The published code in bfloat16 on these fixtures: largest error 0.05, root mean square 0.010.
    assert error.abs().max() < 0.10
    assert error.square().mean().sqrt() < 0.020


def test_golden_gradients(golden) -> None:
    g = golden("train_small_io")
    decoder = decoder_of(golden, torch.float64)  # evaluation mode: drop path off
    features, text = inputs(g, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*features, text)]
    required = torch.zeros(2, 21, dtype=torch.bool)
    for image in range(2):
        required[image, g[f"gt{image}"]] = True
    output = decoder(features, text, num_selected=7, required=required)
    assert torch.equal(output.class_ids, g["indices"].sort(1).values)
    loss = ops.upsample_bce(output.logits, output.class_ids, g["targets"], vocabulary_size=21, ignore_index=255)
    assert_close(loss, g["loss"], 1e-12)
    loss.backward()
    for name, leaf in zip((*INPUTS, "text"), leaves, strict=True):
        wanted = g[f"grad.{name}"]
        assert leaf.grad is not None
        assert_close(leaf.grad, wanted[:, 0] if name == "text" else wanted, 1e-10, name)
    published = golden("train_small_grads0") | golden("train_small_grads1")
    for name, parameter in decoder.named_parameters():
        key = published_name(name)
        assert parameter.grad is not None, name
        if key.endswith(("attention.k.bias", "norm_k.bias")):
            assert_absolutely_close(parameter.grad, published[key], 1e-12, key)
        else:
            assert_close(parameter.grad, published[key], 1e-10, key)


def test_large_maps_cost_no_accuracy() -> None:
    config = CONFIGS["errseg-b"].decoder
    upsampler = Upsampler(config)
    for parameter in upsampler.parameters():
        torch.nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    tokens = torch.randn(1, 2, 40, 40, config.width)
    guidance = [torch.randn(1, c, 40 * 2**i, 40 * 2**i) for i, c in enumerate(config.decoder_guidance)]
    with torch.no_grad():
        logits = upsampler(tokens, tuple(guidance))
        exact = upsampler.double()(tokens.double(), tuple(g.double() for g in guidance))
    assert rms_error(logits, exact) < 3e-7


def test_equals_the_published_order_with_given_and_unsorted_classes(golden) -> None:
    g = golden("eval_nonsquare")
    features, text = inputs(g, torch.float64)
    published = PublishedDecoder.from_published({k: v.double() for k, v in golden("weights").items()}).eval()
    ids = torch.tensor([[9, 2, 12]])
    mine = decoder_of(golden, torch.float64)(features, text, num_selected=5, class_ids=ids)
    theirs = published(features, text, num_selected=5, class_ids=ids)
    assert torch.equal(mine.class_ids, ids)
    assert_close(mine.logits, theirs.logits, 1e-12)


@pytest.mark.parametrize("words", [1, 2, 5])
def test_a_vocabulary_smaller_than_k_is_kept_whole(golden, words: int) -> None:
    features, text = inputs(golden("eval_odd"), torch.float64)
    output = decoder_of(golden, torch.float64)(features, text[:words], num_selected=7)
    assert output.class_ids.tolist() == [list(range(words))]
    assert output.logits.shape == (1, words, 28, 36)


def test_images_of_a_batch_do_not_touch_each_other(golden) -> None:
    features, text = inputs(golden("eval_small_io"), torch.float64)
    decoder = decoder_of(golden, torch.float64)
    both = decoder(features, text, num_selected=7)
    for image in range(2):
        alone = decoder(DenseFeatures(*(f[image : image + 1] for f in features)), text, num_selected=7)
        assert torch.equal(alone.class_ids[0], both.class_ids[image])
        assert_close(alone.logits[0], both.logits[image], 1e-13)


def test_dense_output_has_the_published_layout(golden) -> None:
    features, text = inputs(golden("eval_odd"), torch.float64)
    output = decoder_of(golden, torch.float64)(features, text, num_selected=4)
    dense = output.dense(9)
    assert dense.shape == (1, 9, 28, 36)
    assert torch.equal(dense[0, output.class_ids[0]], output.logits[0])
    rest = [t for t in range(9) if t not in output.class_ids]
    assert (dense[0, rest] == -100).all()


def test_inputs_are_not_changed(golden) -> None:
    features, text = inputs(golden("eval_odd"), torch.float32)
    before = [t.clone() for t in (*features, text)]
    decoder_of(golden, torch.float32)(features, text, num_selected=4)
    assert all(torch.equal(a, b) for a, b in zip(before, (*features, text), strict=True))
    assert max(t.abs().max() for t in features[:4]) > 16  # the clamp had something to do


def test_the_forward_never_synchronises_nor_builds_the_volume(golden) -> None:
    features, _ = inputs(golden("eval_small_io"), torch.float32)
    text = torch.randn(20_000, 40)
    decoder = decoder_of(golden, torch.float32)
    with forbid_host_syncs(), torch.no_grad():
        decoder(features, text, num_selected=7)
    with AllocationSpy() as spy, torch.no_grad():
        decoder(features, text, num_selected=7)
    volume = 2 * 20_000 * 12 * 16 * 4
    assert spy.largest is not None and spy.largest.nbytes < volume


def test_compiles_to_one_graph(golden) -> None:
    torch.compiler.reset()
    features, text = inputs(golden("eval_odd"), torch.float64)
    decoder = decoder_of(golden, torch.float64)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    assert_close(compiled(features, text, num_selected=4).logits, decoder(features, text, num_selected=4).logits, 1e-13)


def test_drop_path_drops_whole_branches_in_training_only(golden) -> None:
    features, text = inputs(golden("eval_odd"), torch.float64)
    decoder = decoder_of(golden, torch.float64)
    calm = decoder(features, text, num_selected=4).logits
    for layer in decoder.rrca.layers:
        layer.spatial.drop_path.drop_prob = layer.classes.drop_path.drop_prob = 0.5
    assert torch.equal(decoder(features, text, num_selected=4).logits, calm)
    decoder.train()
    torch.manual_seed(0)
    draws = torch.stack([decoder(features, text, num_selected=4).logits for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])


def test_published_names_round_trip(golden) -> None:
    weights = golden("weights")
    decoder = Decoder.from_published({f"head.{k}": v for k, v in weights.items()}, prefix="head.")
    back = decoder.published_state_dict("again.")
    assert set(back) == {f"again.{k}" for k in weights}
    assert all(torch.equal(back[f"again.{k}"], v) for k, v in weights.items())


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_a_damaged_checkpoint_is_refused_by_name(golden, damage: str) -> None:
    weights = golden("weights")
    key = "aggregator_layers.1.class_fusion.sa.mlp.fc2.bias"
    if damage == "missing":
        del weights[key]
    elif damage == "misshapen":
        weights[key] = weights[key][:-1]
    else:
        key = "aggregator_layers.1.surprise.weight"
        weights[key] = torch.zeros(3)
    with pytest.raises(ErrSegError, match=key.replace(".", r"\.")):
        Decoder.from_published(weights)


def test_wrong_arguments_are_named(golden) -> None:
    features, text = inputs(golden("eval_odd"), torch.float32)
    decoder = decoder_of(golden, torch.float32)
    with pytest.raises(ValueError, match=r"text_embeddings \[T, 40\] with T >= 1, got \[9, 39\] float32"):
        decoder(features, text[:, :39], num_selected=4)
    with pytest.raises(ValueError, match="num_selected >= 1, got 0"):
        decoder(features, text, num_selected=0)
    with pytest.raises(ValueError, match=r"class_ids \[1, K\] int64, got \[2, 3\] int64"):
        decoder(features, text, num_selected=4, class_ids=torch.zeros(2, 3, dtype=torch.int64))
