"""Head and meta-architecture in the published arrangement: the loss, the scores, the words, and how they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import errseg
from errseg.testing import AllocationSpy, assert_close, forbid_host_syncs, random_features, random_text_embeddings
from tests.accelerate import stand_ins
from tests.accelerate.stand_ins import CONFIG, WORDS, Decoder, Model, yardstick
from tests.accelerate.test_decoder import assert_same_gradients


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "keep_double", True)


def records(batch: int = 2, height: int = 50, width: int = 70) -> list[dict[str, Any]]:
    """Pictures with label maps of a few classes and a margin of ignored pixels, and the size of the answer."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(batch):
        image = torch.randint(0, 256, (3, height, width), generator=generator)
        labels = torch.randint(0, 3, (height, width), generator=generator).masked_fill(torch.rand(height, 1) < 0.1, 255)
        made.append({"image": image, "sem_seg": labels, "height": 37, "width": 61})
    return made


def answer(model: Model, given: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = model(given)
    assert list(losses) == ["loss_sem_seg_0"]
    losses["loss_sem_seg_0"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses["loss_sem_seg_0"].detach(), grads


@pytest.mark.parametrize(("divisor", "batch"), [(-1, 2), (32, 1)])
def test_loss_and_gradients_of_towers_and_decoder_equal_the_published_ones(divisor: int, batch: int) -> None:
    given = records(batch)
    loss, grads = answer(stand_ins.model(divisor=divisor), given)
    model = errseg.accelerate(stand_ins.model(divisor=divisor))
    mine, found = answer(model, given)
    assert_close(mine, loss, 1e-12)
    assert_same_gradients(found, grads)
    assert "sem_seg_head.clip_model.token_embedding.weight" in found


def test_classes_that_do_not_fit_cost_what_they_cost_in_the_dense_loss() -> None:
    given = records()
    for record in given:
        record["sem_seg"] = torch.arange(50 * 70).view(50, 70) % len(WORDS)  # more classes than the K that are kept
    loss, grads = answer(stand_ins.model(), given)
    mine, found = answer(errseg.accelerate(stand_ins.model()), given)
    assert_close(mine, loss, 1e-12)
    assert_same_gradients(found, grads)


def maps_of_the_whole_vocabulary(model: Model) -> list[tuple[int, ...]]:
    """Shapes of what a training step makes for all classes at all pixels of the label map."""
    with AllocationSpy() as spy:
        model(records())["loss_sem_seg_0"].backward()
    return [a.shape for a in spy.allocations if len(WORDS) in a.shape and torch.Size(a.shape).numel() >= 9 * 50 * 70]


def test_no_map_of_the_whole_vocabulary_is_made_in_training() -> None:
    assert maps_of_the_whole_vocabulary(stand_ins.model())
    assert not maps_of_the_whole_vocabulary(errseg.accelerate(stand_ins.model()))


def test_training_never_waits_for_the_device() -> None:
    model, given = errseg.accelerate(stand_ins.model()), records()
    model(given)  # the first pass makes the tokens
    with forbid_host_syncs():
        model(given)["loss_sem_seg_0"].backward()


def test_scores_equal_the_published_ones_and_are_zero_elsewhere() -> None:
    given = records(2)
    published, model = stand_ins.model().eval(), errseg.accelerate(stand_ins.model()).eval()
    with torch.no_grad():
        wanted = torch.stack([published([record])[0]["sem_seg"] for record in given])
        got = torch.stack([result["sem_seg"] for result in model(given)])
    assert got.shape == (2, 8, 37, 61) and got.dtype == torch.float32
    assert (got - wanted).abs().max() < 2e-6  # from float32 logits on
    shown = got.flatten(2).amax(2) > 0
    assert shown.sum(1).tolist() == [4, 4]
    assert got.argmax(1).equal(wanted.argmax(1))


def test_restored_it_answers_to_the_bit_as_before() -> None:
    model, given = stand_ins.model(), records()
    classes = {name: type(module) for name, module in model.named_modules()}
    loss, grads = answer(model, given)
    answer(errseg.accelerate(model), given)
    assert {type(m) for m in (model, model.sem_seg_head)}.isdisjoint({Model, stand_ins.Head})
    assert {name: type(module) for name, module in errseg.restore(model).named_modules()} == classes
    again, found = answer(model, given)
    assert again.equal(loss) and all(found[name].equal(grad) for name, grad in grads.items())


def test_prompts_are_cut_and_embeddings_kept_until_words_or_weights_change() -> None:
    model = stand_ins.model().eval()
    head, wanted = model.sem_seg_head, model.sem_seg_head.get_text_embeds(WORDS)
    errseg.accelerate(model)
    lengths: list[int] = []
    head.clip_model.transformer.register_forward_hook(lambda module, args, out: lengths.append(len(out)))
    with torch.no_grad():
        assert_close(head.get_text_embeds(WORDS), wanted, 1e-12)
        first = head.get_text_embeds(WORDS)
        assert lengths == [10]  # "A photo of a traffic light in the scene" and its end, once
        assert_close(head.get_text_embeds(WORDS[3:]), wanted[3:], 1e-12)
        assert head.get_text_embeds(WORDS) is first and len(lengths) == 2
        head.clip_model.ln_final.bias.add_(1)
        changed = head.get_text_embeds(WORDS)
        assert not torch.allclose(changed, first)
        head.clip_model.ln_final.bias.data.mul_(-1)  # which no version counter sees
        model.train().eval()
        assert not torch.allclose(head.get_text_embeds(WORDS), changed)
        head.clip_model.float()
        assert head.get_text_embeds(WORDS).dtype == torch.float32
    assert head.get_text_embeds(WORDS).requires_grad  # not kept where gradients are wanted


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "distribute"])
def test_distributed_data_parallel(first: str, process_group: None) -> None:
    given, model = records(), stand_ins.model()
    loss, grads = answer(model, given)
    if first == "accelerate":
        model = DistributedDataParallel(errseg.accelerate(model))
    else:
        model = errseg.accelerate(DistributedDataParallel(model))
    for _ in range(2):  # a second pass fails where the first left parameters without a gradient
        mine, found = answer(model, given)
    assert_close(mine, loss, 1e-12)
    assert_same_gradients({name.removeprefix("module."): grad for name, grad in found.items()}, grads)


def test_autocast_gradient_scaler_and_another_dtype() -> None:
    given = records()
    _, exact = answer(stand_ins.model(), given)
    errors = []
    for model in (stand_ins.model().float(), errseg.accelerate(stand_ins.model()).float()):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(given)["loss_sem_seg_0"]
        assert loss.dtype == torch.float32
        torch.amp.GradScaler("cpu", init_scale=1024.0).scale(loss).backward()
        found = {name: p.grad / 1024 for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == exact.keys()
        errors.append(torch.cat([(found[name] - grad).flatten() for name, grad in exact.items()]).norm())
    size = torch.cat([grad.flatten() for grad in exact.values()]).norm()
    theirs, mine = errors
    assert mine <= 2 * theirs and mine < 0.1 * size


def test_the_head_alone_and_the_decoder_alone_answer_densely() -> None:
    model, given = stand_ins.model(), records()
    loss, grads = answer(model, given)
    for part in (model.sem_seg_head, model.sem_seg_head.decoder):
        errseg.accelerate(part)  # the model around it keeps its own loss
        mine, found = answer(model, given)
        assert type(model) is Model
        assert_close(mine, loss, 1e-6)  # over the published float32 logits
        assert_same_gradients(found, grads, 1e-5)
        errseg.restore(part)


def decoder_inputs(batch: int) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    text = random_text_embeddings(9, CONFIG.text_dim, seed=2)
    features = random_features(CONFIG, batch, 6, 4, seed=3, text_embeddings=text)
    os4, os8, os16, os32, *dense = (t.double() for t in features)
    truth = [torch.tensor([7, 2]), torch.tensor([0])][:batch]
    return dense, text.double()[None, :, None].repeat(batch, 1, 1, 1), [os32, os16, os8, os4], truth


def test_words_may_differ_from_image_to_image() -> None:
    dense, text, taps, truth = decoder_inputs(2)
    text[1] = text[1].flip(0)
    decoder = Decoder.from_published(yardstick(config=CONFIG).state_dict(), drop_path_rate=0.0)
    before = [tap.clone() for tap in taps]
    for training in (True, False):
        wanted = decoder.train(training)(dense, text, taps, truth)
        got = errseg.accelerate(decoder)(dense, text, taps, truth)
        assert got.dtype == torch.float32 and (got == -100).all(-1).all(-1).sum(1).tolist() == [5, 5]
        assert_close(got, wanted.float(), 1e-6)
        shared = errseg.accelerate(decoder)(dense, text[:1].expand(2, -1, -1, -1), taps, truth)
        assert_close(shared[:1], got[:1], 1e-6)
        errseg.restore(decoder)
    assert all(tap.equal(kept) for tap, kept in zip(taps, before, strict=True))


def test_wrong_arguments_are_named() -> None:
    dense, text, taps, truth = decoder_inputs(2)
    decoder = errseg.accelerate(Decoder.from_published(yardstick(config=CONFIG).state_dict())).train()
    with pytest.raises(ValueError, match="expected gt_classes of 2 images, got None"):
        decoder(dense, text, taps, None)
    with pytest.raises(ValueError, match=r"expected text_feats \[B, T, 1, D\], got \[2, 9, 2, 24\]"):
        decoder(dense, text.repeat(1, 1, 2, 1), taps, truth)


def test_a_module_around_it_that_is_not_the_published_one_stays_as_it_is() -> None:
    class Wrapper(nn.Module):
        def __init__(self, decoder: nn.Module) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: Tensor) -> Tensor:
            return x

    wrapper = errseg.accelerate(Wrapper(stand_ins.model().sem_seg_head.decoder))
    assert type(wrapper) is Wrapper and type(wrapper.decoder) is not Decoder
    errseg.restore(wrapper)
    assert type(wrapper.decoder) is Decoder
