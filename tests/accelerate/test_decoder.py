"""An accelerated decoder is the published one: outputs, gradients, names, and all that training does to a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import errseg
from errseg import DenseFeatures, ErrSegError, ops
from errseg.testing import (
    PublishedDecoder,
    assert_absolutely_close,
    assert_close,
    published_dense,
    published_loss,
    random_decoder_weights,
    random_features,
    random_target,
    random_text_embeddings,
)
from errseg.testing.inputs import SMALL_DECODER
from tests.accelerate.stand_ins import yardstick

WORDS, KEPT = 13, 5
VANISHING = ("attention.k.bias", "norm_k.bias")  # zero gradients in exact arithmetic


def inputs(dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[DenseFeatures, Tensor]:
    text = random_text_embeddings(WORDS, SMALL_DECODER.text_dim, seed=2)
    features = random_features(SMALL_DECODER, batch, 6, 8, seed=3, text_embeddings=text, num_present=5)
    return DenseFeatures(*(t.to(dtype) for t in features)), text.to(dtype)


def target_and_required(batch: int = 2) -> tuple[Tensor, Tensor]:
    target = random_target(batch, 37, 45, 4, seed=4)
    required = torch.zeros(batch, WORDS, dtype=torch.bool)
    required[:, :4] = True
    return target, required


def run(decoder: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    features, text = inputs(dtype)
    with torch.no_grad():
        return decoder(features, text, num_selected=KEPT).logits


def loss_of(decoder: nn.Module, dtype: torch.dtype = torch.float64, *, dense: bool = False) -> Tensor:
    features, text = inputs(dtype)
    target, required = target_and_required()
    logits, ids = decoder(features, text, num_selected=KEPT, required=required)
    if dense:
        return published_loss(published_dense(logits, ids, WORDS), target)
    return ops.upsample_bce(logits, ids, target, vocabulary_size=WORDS)


def gradients(decoder: nn.Module, dtype: torch.dtype = torch.float64, *, dense: bool = False) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss_of(decoder, dtype, dense=dense).backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        if name.endswith(VANISHING):
            assert_absolutely_close(mine[name], grad, tolerance, name)
        else:
            assert_close(mine[name], grad, tolerance, name)


def test_it_is_the_same_object_with_the_same_parameters_and_names() -> None:
    decoder = yardstick()
    parameters, state, modules = dict(decoder.named_parameters()), decoder.state_dict(), dict(decoder.named_modules())
    random_state = torch.get_rng_state()
    assert errseg.accelerate(decoder) is decoder
    assert torch.get_rng_state().equal(random_state)
    assert isinstance(decoder, PublishedDecoder) and repr(decoder).startswith("PublishedDecoder(")
    for now, before in ((dict(decoder.named_parameters()), parameters), (dict(decoder.named_modules()), modules)):
        assert list(now) == list(before) and all(now[name] is before[name] for name in before)
    assert list(decoder.state_dict()) == list(state)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_the_published_ones(training: bool) -> None:
    published, decoder = yardstick().train(training), errseg.accelerate(yardstick()).train(training)
    features, text = inputs()
    _, required = target_and_required()
    wanted = published(features, text, num_selected=KEPT, required=required)
    got = decoder(features, text, num_selected=KEPT, required=required)
    assert got.class_ids.equal(wanted.class_ids)
    assert_close(got.logits, wanted.logits, 1e-10)
    assert not got.logits.equal(wanted.logits)  # another order of operations has run
    assert_close(loss_of(decoder), loss_of(published, dense=True), 1e-10)
    assert_same_gradients(gradients(decoder), gradients(published, dense=True))


def test_restore_brings_the_published_computation_back_to_the_bit() -> None:
    decoder = yardstick()
    attributes, wanted = set(vars(decoder)), run(decoder)
    assert not run(errseg.accelerate(decoder)).equal(wanted)
    assert errseg.restore(decoder) is decoder and type(decoder) is PublishedDecoder
    assert set(vars(decoder)) == attributes and run(decoder).equal(wanted)


def test_accelerating_twice_is_accelerating_once() -> None:
    decoder = errseg.accelerate(errseg.accelerate(yardstick()))
    assert type(errseg.restore(decoder)) is PublishedDecoder
    with pytest.raises(ErrSegError, match=r"^errseg.restore: this PublishedDecoder is not accelerated$"):
        errseg.restore(decoder)


def test_drop_path_follows_the_published_modules_and_their_random_numbers() -> None:
    decoder = yardstick()
    layers = [layer for stack in decoder.aggregator_layers for layer in (stack.spatial_fusion, stack.class_fusion)]
    calm = run(decoder.train())
    errseg.accelerate(decoder)
    assert_close(run(decoder), calm, 1e-10)
    for layer in layers:
        layer["sa"].drop_path.drop_prob = 0.5
    torch.manual_seed(1)
    dropped = run(decoder)
    assert (dropped - calm).abs().max() > 1e-3
    torch.manual_seed(1)
    assert_close(run(errseg.restore(decoder)), dropped, 1e-6)  # the masks are in float32
    assert_close(run(errseg.accelerate(decoder).eval()), calm, 1e-10)
    for layer in layers:
        layer["sa"].drop_path = nn.Identity()
    assert_close(run(errseg.accelerate(decoder).train()), calm, 1e-10)


def test_optimizer_steps_equal_the_published_ones() -> None:
    published, decoder = yardstick(), yardstick()
    optimizers = [torch.optim.AdamW(d.parameters(), lr=1e-3, weight_decay=0.1) for d in (published, decoder)]
    errseg.accelerate(decoder)  # after the optimizer took its parameters
    for _ in range(2):
        for model, optimizer, dense in zip((published, decoder), optimizers, (True, False), strict=True):
            gradients(model, dense=dense)
            optimizer.step()
    start = random_decoder_weights(SMALL_DECODER, seed=1, dtype=torch.float64)
    for (name, wanted), got in zip(published.named_parameters(), decoder.parameters(), strict=True):
        if not name.endswith(VANISHING):  # AdamW makes whole steps of what rounding leaves there
            assert_close(got - start[name], wanted - start[name], 1e-6, name)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_count(assign: bool) -> None:
    decoder = errseg.accelerate(yardstick())
    before = run(decoder)
    other = random_decoder_weights(SMALL_DECODER, seed=8, dtype=torch.float64)
    decoder.load_state_dict(other, assign=assign)
    after = run(decoder)
    assert not torch.allclose(after, before)
    assert_close(after, run(PublishedDecoder.from_published(other, drop_path_rate=0.0)), 1e-10)


def test_conversion_frozen_and_replaced_parameters() -> None:
    decoder = errseg.accelerate(yardstick(torch.float32)).to(torch.float64)
    assert_close(run(decoder), run(yardstick()), 1e-10)
    decoder.aggregator_layers.requires_grad_(False)
    published = yardstick()
    published.aggregator_layers.requires_grad_(False)
    assert_same_gradients(gradients(decoder), gradients(published, dense=True))
    for model in (decoder, published):
        model.head.weight = nn.Parameter(2 * model.head.weight.detach())
        with torch.no_grad():
            model.up_decoder2.up_conv.weight.mul_(0.5)
            model.low_img_fusion.weight.data = model.low_img_fusion.weight.data * 3
    assert_close(run(decoder), run(published), 1e-10)


def test_a_replaced_layer_is_reported_and_taken_by_accelerating_again() -> None:
    decoder = errseg.accelerate(yardstick())
    attention = decoder.aggregator_layers[1].spatial_fusion["sa"].attention
    attention.q = nn.Linear(64, 32, dtype=torch.float64)
    name = r"aggregator_layers\.1\.spatial_fusion\.sa\.attention\.q"
    with pytest.raises(ErrSegError, match=rf"^{name} is another module since errseg.accelerate"):
        run(decoder)
    got = run(errseg.accelerate(decoder))
    assert_close(got, run(errseg.restore(decoder)), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaler(dtype: torch.dtype) -> None:
    published, decoder = yardstick(torch.float32), errseg.accelerate(yardstick(torch.float32))
    exact = gradients(yardstick(), dense=True)
    found = []
    for model, dense in ((published, True), (decoder, False)):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, torch.float32, dense=dense)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
    size = torch.stack([grad.square().sum() for grad in exact.values()]).sum().sqrt()
    theirs, mine = (
        torch.stack([(steps[name] - grad).square().sum() for name, grad in exact.items()]).sum().sqrt() / size
        for steps in found
    )
    assert mine <= 2 * theirs and mine < 0.1


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    wanted = gradients(yardstick(), dense=True)
    before = errseg.accelerate(yardstick())
    assert_same_gradients(gradients(DistributedDataParallel(before).module), wanted)
    after = DistributedDataParallel(yardstick())
    assert errseg.accelerate(after) is after
    for _ in range(2):  # a second pass fails where the first left parameters without a gradient
        found = gradients(after)
    assert_same_gradients({name.removeprefix("module."): grad for name, grad in found.items()}, wanted)
    assert type(errseg.restore(after).module) is PublishedDecoder


def test_compiled_code_follows_accelerate_weights_and_restore() -> None:
    torch.compiler.reset()
    config = replace(SMALL_DECODER, num_layers=1)
    decoder, (features, text) = yardstick(config=config), inputs()
    ids = ops.reduce_vocabulary(features.os16_dense, text, KEPT)  # the yardstick's own selection does not compile
    wanted, published = gradients(decoder, dense=True), run(decoder)
    # With Inductor's decompositions, as it and not "aot_eager" runs the backward pass of hardtanh.
    compiled = torch.compile(errseg.accelerate(decoder), fullgraph=True, backend="aot_eager_decomp_partition")
    found = gradients(compiled)
    assert_same_gradients({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, wanted)
    decoder.load_state_dict(random_decoder_weights(config, seed=8, dtype=torch.float64))
    loss, fused = loss_of(compiled), run(decoder)
    assert_close(loss, loss_of(decoder), 1e-12)
    assert not torch.allclose(fused, published)
    errseg.restore(decoder)
    with torch.no_grad():
        again = compiled(features, text, num_selected=KEPT, class_ids=ids).logits
    assert_close(again, fused, 1e-10)
    assert not again.equal(fused)
    torch.compiler.reset()


def test_copies_and_pickles_stand_on_their_own() -> None:
    decoder = errseg.accelerate(yardstick())
    wanted = run(decoder)
    file = io.BytesIO()
    torch.save(decoder, file)
    file.seek(0)
    copies = [copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        decoder.head.weight.mul_(2)
    assert not torch.allclose(run(decoder), wanted)
    for made in copies:
        assert type(made) is type(decoder) and run(made).equal(wanted)
        made.load_state_dict(decoder.state_dict())
        assert run(made).equal(run(decoder))
        assert type(errseg.restore(made)) is PublishedDecoder
    assert type(decoder) is not PublishedDecoder


def with_forward_of_its_own(decoder: nn.Module) -> None:
    decoder.forward = decoder.forward


def with_more_groups(decoder: nn.Module) -> None:
    decoder.up_decoder1.textual_fusion[1] = nn.GroupNorm(4, 16)


def with_dropout(decoder: nn.Module) -> None:
    decoder.aggregator_layers[0].spatial_fusion["sa"].attention.proj_drop = nn.Dropout(0.1)


def with_attention_dropout(decoder: nn.Module) -> None:
    decoder.aggregator_layers[1].class_fusion["sa"].attention.attn_drop = 0.2


def with_another_head(decoder: nn.Module) -> None:
    decoder.head = nn.Conv2d(8, 2, 1)


def with_one_more_layer(decoder: nn.Module) -> None:
    decoder.surprise = nn.Linear(2, 2)


def without_a_bias(decoder: nn.Module) -> None:
    decoder.aggregator_layers[1].class_fusion["sa"].mlp.fc2.bias = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_forward_of_its_own, "the forward of this PublishedDecoder object was replaced"),
        (with_more_groups, r"up_decoder1\.textual_fusion\.1 is GroupNorm\(4, 16.*, expected GroupNorm\(2, 16"),
        (with_dropout, r"spatial_fusion\.sa\.attention\.proj_drop drops with p 0\.1, expected 0"),
        (with_attention_dropout, r"aggregator_layers\.1\.class_fusion\.sa\.attention has attn_drop 0\.2, expected 0"),
        (with_another_head, r"head\.weight has shape \[2, 8, 1, 1\], expected \[1, 8, 1, 1\]"),
        (with_one_more_layer, r"surprise\.weight does not belong"),
        (without_a_bias, r"aggregator_layers\.1\.class_fusion\.sa\.mlp\.fc2\.bias is missing"),
    ],
)
def test_what_differs_is_named_and_left_unchanged(change, reason: str) -> None:
    decoder = yardstick()
    change(decoder)
    with pytest.raises(ErrSegError, match=f"^errseg.accelerate: .*{reason}") as caught:
        errseg.accelerate(decoder)
    assert "\n" not in str(caught.value)
    assert type(decoder) is PublishedDecoder


def test_other_modules_are_refused() -> None:
    with pytest.raises(ErrSegError, match=r"this Linear has no corr_proj_convs\.0\.0\.weight$"):
        errseg.accelerate(nn.Linear(2, 2))
    with pytest.raises(ErrSegError, match=r"this Decoder has no corr_proj_convs\.0\.0\.weight$"):
        errseg.accelerate(errseg.Decoder(SMALL_DECODER))
    with pytest.raises(ErrSegError, match=r"not a dict$"):
        errseg.accelerate({})

    class Other(PublishedDecoder):
        def forward(self, picture: Tensor) -> Tensor:
            return picture

    with pytest.raises(ErrSegError, match=r"Other\.forward takes picture, expected img_feats, text_feats"):
        errseg.accelerate(Other(SMALL_DECODER))
