"""The decoder beside the published one: selected classes, logits, loss, gradients, label maps."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import errseg
from errseg import ops
from errseg.testing.inputs import random_target
from errseg.verify.checkout import OfficialCode
from errseg.verify.checks import Check, Leniency, compare_errors, compare_labels, failed, vote_bounds
from errseg.verify.golden import VANISHING
from errseg.verify.official_settings import Setting, decoder_inputs, decoder_weights
from errseg.verify.yardstick import Gates, flipped

KINK_ROUNDINGS = 64  # of a gate's input after several layers
KINK_PARTS = 4


class Answer(NamedTuple):
    """What a decoder made: logits of its classes, the dense map where it is the published one, gradients."""

    class_ids: Tensor
    logits: Tensor
    dense: Tensor | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = {}

    def in_order(self, class_ids: Tensor) -> Answer:
        """The same with its classes in another order [B, K]."""
        gradients = self.gradients
        if "logits" in gradients:
            gradients = gradients | {"logits": reordered(gradients["logits"], self.class_ids, class_ids)}
        logits = reordered(self.logits, self.class_ids, class_ids)
        return Answer(class_ids, logits, self.dense, self.loss, gradients)


def same_classes(a: Tensor, b: Tensor) -> bool:
    """Whether two selections [B, K] keep the same classes; the published code shuffles them."""
    return a.sort(1).values.equal(b.sort(1).values)


def reordered(maps: Tensor, class_ids: Tensor, wanted: Tensor) -> Tensor:
    """Maps [B, K, H, W] of `class_ids` [B, K] in the order of `wanted`, the same ids."""
    places = class_ids.argsort(1).gather(1, wanted.argsort(1).argsort(1))
    return maps.gather(1, places[:, :, None, None].expand_as(maps))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The published code makes tensors of the default dtype, and counts integers, which PyTorch does on GPUs only."""
    before, histc = torch.get_default_dtype(), torch.histc

    def count(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return histc(values if values.is_floating_point() else values.double(), *args, **kwargs)

    try:
        torch.set_default_dtype(dtype)
        with patch.object(torch, "histc", count):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def watched(decoder: Any) -> Iterator[dict[str, Tensor]]:
    """What a published decoder selects and scores when it runs: "ids" [B, K] and "logits" [B K, 1, H, W]."""
    seen: dict[str, Tensor] = {}
    select, head = decoder.select_classes, decoder.head.forward

    def selected(*args: Any, **kwargs: Any) -> Tensor:
        seen["ids"] = select(*args, **kwargs)
        return seen["ids"]

    def scored(x: Tensor) -> Tensor:
        seen["logits"] = head(x)  # the published code goes on in float32
        return seen["logits"]

    with patch.object(decoder, "select_classes", selected), patch.object(decoder.head, "forward", scored):
        yield seen


def _official_answer(
    code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device, target: Tensor | None = None
) -> Answer:
    """The published decoder on the setting's inputs; with a target, loss and gradients as well."""
    features, text = decoder_inputs(setting, dtype, device)
    weights = decoder_weights(setting, dtype, device)
    with default_dtype(dtype), torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = code.decoder(setting.decoder, setting.num_selected).to(device)
        decoder.load_state_dict(weights)
        decoder.train(target is not None)
        if dtype == torch.float64:
            ups = decoder.up_decoder1, decoder.up_decoder2, decoder.up_decoder3
            _keep_no_activations(*decoder.aggregator_layers, *ups)
        leaves = [t.requires_grad_(target is not None) for t in (*features, text)]
        os4, os8, os16, os32 = (t.clone() for t in features[:4])  # they are clamped in place
        repeated = text[None, :, None].repeat(setting.batch, 1, 1, 1)
        truth = None if target is None else [t.unique()[t.unique() != 255] for t in target]
        with watched(decoder) as seen, torch.set_grad_enabled(target is not None):
            maps = [features.os16_dense, features.os32_dense]
            dense = decoder(maps, repeated, [os32, os16, os8, os4], truth)
        logits = seen["logits"].unflatten(0, (setting.batch, -1))[:, :, 0]
        if target is None:
            return Answer(seen["ids"], logits.detach(), dense)
        loss = _official_loss(code, dense if dtype == torch.float32 else _dense(logits, seen["ids"], dense), target)
        names = [name for name, _ in decoder.named_parameters()]
        wanted = [seen["logits"], *leaves, *decoder.parameters()]
        first, *grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        assert first is not None
        return Answer(seen["ids"], logits.detach(), None, loss.detach(), _named((first.view_as(logits), *grads), names))


def _keep_no_activations(*layers: Any) -> None:
    """The backward pass computes these layers again, for the memory of float64 at the published sizes."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _dense(logits: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """The published dense map in float64, which the published code rounds to float32."""
    made = logits.new_full(like.shape, -100.0)
    return made.scatter(1, ids[:, :, None, None].expand_as(logits), logits)


def _official_loss(code: OfficialCode, dense: Tensor, target: Tensor) -> Tensor:
    """The loss of the published model's own forward pass, given what its head answers."""
    model = types.SimpleNamespace(
        training=True,
        device=dense.device,
        clip_pixel_mean=torch.zeros(3, 1, 1, device=dense.device),
        clip_pixel_std=torch.ones(3, 1, 1, device=dense.device),
        size_divisibility=-1,
        clip_resolution=(32, 32),
        ignore_value=255,
        sem_seg_head=Head(lambda *args: dense, lambda image, dense: {"clip_vis_dense": image}),
    )
    image = torch.zeros(3, 32, 32, device=dense.device)
    inputs = [{"image": image, "sem_seg": t} for t in target]
    # The published loss is in float32 whatever comes; float64 is to stay.
    with patch.object(Tensor, "float", lambda t: t.to(dense.dtype)):
        return code.forward(model, inputs)["loss_sem_seg_0"]


class Head:
    """What the published model asks of its head."""

    def __init__(self, answer: Callable[..., Any], encode_image: Callable[..., Any]) -> None:
        self.answer = answer
        self.clip_model = types.SimpleNamespace(encode_image=encode_image)

    def __call__(self, *args: Any) -> Any:
        return self.answer(*args)


def _named(grads: tuple[Tensor | None, ...], parameters: list[str]) -> dict[str, Tensor]:
    names = ["logits", *errseg.DenseFeatures._fields, "text", *parameters]
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def _our_answer(
    setting: Setting,
    class_ids: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    target: Tensor | None = None,
) -> Answer:
    """This project's decoder on the same inputs, for the classes that the published code chose."""
    from errseg.model.decoder import published_name

    features, text = decoder_inputs(setting, dtype, device)
    decoder = errseg.Decoder.from_published(decoder_weights(setting, dtype, device)).eval()
    if dtype == torch.float64:
        _keep_no_activations(*decoder.rrca.layers, *decoder.upsampler.steps)
    leaves = [t.requires_grad_(target is not None) for t in (*features, text)]
    with torch.set_grad_enabled(target is not None):
        output = decoder(features, text, num_selected=setting.num_selected, class_ids=class_ids)
    if target is None:
        return Answer(class_ids, output.logits)
    loss = ops.upsample_bce(output.logits, class_ids, target, vocabulary_size=setting.words)
    names = [published_name(name) for name, _ in decoder.named_parameters()]
    grads = torch.autograd.grad(loss, [output.logits, *leaves, *decoder.parameters()], allow_unused=True)
    return Answer(class_ids, output.logits.detach(), None, loss.detach(), _named(grads, names))


class DecoderPair:
    """Both decoders on one setting; what the published one answers in float64 serves every dtype."""

    def __init__(self, code: OfficialCode, setting: Setting, device: torch.device) -> None:
        self.code, self.setting, self.device = code, setting, device
        self._exact: Answer | None = None

    def compare_evaluation(self, dtype: torch.dtype) -> list[Check]:
        """Selected classes, logits per class, label map."""
        theirs = self._theirs(dtype)
        found = _compare_selection(self.setting, theirs.class_ids, None, dtype, self.device)
        ours = _our_answer(self.setting, theirs.class_ids, dtype, self.device)
        exact = self._truth(theirs)
        found += compare_errors("logits", ours.logits, theirs.logits, exact.logits)
        if dtype == torch.float32 and theirs.dense is not None:
            labels = ops.upsample_argmax(ours.logits, theirs.class_ids, self.setting.output)
            assert isinstance(labels, Tensor)
            apart = (ours.logits - theirs.logits).abs().max().item()
            found.append(_compare_label_maps(labels, theirs.dense, ours.logits, theirs.class_ids, apart))
        return found

    def compare_training(self, dtype: torch.dtype) -> list[Check]:
        """Selection with ground truth, loss, and gradients of logits, features, text and every parameter."""
        setting = self.setting
        target = random_target(setting.batch, *setting.output, min(setting.words, 6), seed=4).to(self.device)
        required = torch.stack([_membership(t.unique()[t.unique() != 255], setting.words) for t in target])
        theirs = self._theirs(dtype, target)
        found = _compare_selection(setting, theirs.class_ids, required, dtype, self.device)
        ours = _our_answer(setting, theirs.class_ids, dtype, self.device, target)
        exact = self._truth(theirs, target)
        assert ours.loss is not None and theirs.loss is not None and exact.loss is not None
        found += compare_errors("logits", ours.logits, theirs.logits, exact.logits)
        found += compare_errors("loss", ours.loss, theirs.loss, exact.loss)
        grads = compare_gradients(ours, theirs, exact)
        if dtype != torch.float64 and not all(check.passed for check in grads):
            grads = compare_gradients(ours, theirs, exact, self._kinks(exact, dtype, target))
        return found + grads

    def _theirs(self, dtype: torch.dtype, target: Tensor | None = None) -> Answer:
        answer = _official_answer(self.code, self.setting, dtype, self.device, target)
        if dtype == torch.float64:
            self._exact = answer
        return answer

    def _truth(self, answer: Answer, target: Tensor | None = None) -> Answer:
        """What the published decoder answers in float64 for the classes of `answer`, in their order."""
        if self._exact is None or not same_classes(self._exact.class_ids, answer.class_ids):
            chosen = answer.class_ids
            with patch.object(self.code.decoder_module.Decoder, "select_classes", lambda *args, **kwargs: chosen):
                self._exact = _official_answer(self.code, self.setting, torch.float64, self.device, target)
        return self._exact.in_order(answer.class_ids)

    def _kinks(self, exact: Answer, dtype: torch.dtype, target: Tensor) -> dict[str, Tensor]:
        """How far each gradient moves when the gates that rounding could flip do flip, a part of them at a time."""
        moved = {name: torch.zeros_like(grad) for name, grad in exact.gradients.items()}
        for part in range(KINK_PARTS):
            gates = Gates(KINK_ROUNDINGS * torch.finfo(dtype).eps / 2, part, KINK_PARTS)
            with ops.use_backend("reference"), flipped(gates):
                answer = _our_answer(self.setting, exact.class_ids, torch.float64, self.device, target)
            for name in moved:
                if name in answer.gradients:
                    moved[name] += (answer.gradients[name] - exact.gradients[name]).abs()
        return moved


def compare_gradients(
    ours: Answer, theirs: Answer, exact: Answer, kinks: dict[str, Tensor] | None = None, *, roundings: int = 64
) -> list[Check]:
    """Every gradient that the published code has; `kinks` is by how much flipped gates may move each entry."""
    found: list[Check] = []
    scale = max(grad.abs().max().item() for name, grad in exact.gradients.items() if name != "logits")
    for name, grad in exact.gradients.items():
        quantity, got = f"grad {name}", ours.gradients.get(name)
        if got is None:
            found.append(failed(quantity, "no gradient"))
        elif name.endswith(VANISHING):
            found.append(Check(quantity, "absolute", got.abs().max().item(), torch.finfo(got.dtype).eps * scale))
        else:
            leniency = Leniency(kinks=kinks[name]) if kinks else None
            # Long sums in another order: float32's own error there is a matter of luck.
            found += compare_errors(quantity, got, theirs.gradients[name], grad, roundings=roundings, leniency=leniency)
    return found


def _compare_label_maps(labels: Tensor, dense: Tensor, logits: Tensor, class_ids: Tensor, apart: float) -> Check:
    """Sigmoid, bilinear, argmax over all T, image by image as published; logits that differ by `apart` may tie."""
    expected = []
    for image in dense:
        probabilities = nn.functional.interpolate(image.sigmoid()[None], labels.shape[1:], mode="bilinear")
        expected.append(probabilities[0].argmax(0).to(labels.dtype))
    return compare_labels(labels, torch.stack(expected), logits, class_ids, slack=0.5 * apart, twins=False)


def _compare_selection(
    setting: Setting, official: Tensor, required: Tensor | None, dtype: torch.dtype, device: torch.device
) -> list[Check]:
    """Sets of classes, equal wherever the votes decide; the published code leaves ties to chance."""
    features, text = decoder_inputs(setting, dtype, device)
    votes = ops.class_votes(features.os16_dense, text)
    ours = ops.select_classes(votes, setting.num_selected, required)
    lowest, highest, _ = vote_bounds(features.os16_dense, text)
    wrong = unsure = 0
    for image, (low, high) in enumerate(zip(lowest, highest, strict=True)):
        mine, published = (_membership(ids[image], setting.words) for ids in (ours, official))
        ahead = (low[None] > high[:, None]).sum(1)  # classes surely before this one
        level = (high[None] >= low[:, None]).sum(1) - 1  # classes possibly before it
        decided = (ahead >= setting.num_selected) | (level < setting.num_selected)
        if required is not None:
            # Ground truth comes first, then voted classes by id: sure only where the voted set is sure.
            decided = decided & bool(decided.all()) | required[image]
        wrong += int(((mine != published) & decided).sum())
        unsure += int((mine != published).sum()) - int(((mine != published) & decided).sum())
    counts = {len(set(ids.tolist())) for ids in official}
    if counts != {ours.shape[1]}:
        return [failed("class ids", f"{counts} different classes, expected {ours.shape[1]}")]
    note = f"{setting.num_selected} of {setting.words} classes, {unsure} apart at ties of votes"
    return [Check("class ids", "wrong", wrong, 0.0, note=note)]


def _membership(ids: Tensor, words: int) -> Tensor:
    return torch.zeros(words, dtype=torch.bool, device=ids.device).index_fill(0, ids, True)
