"""This project against the published code itself: the same random weights and inputs in both."""

from __future__ import annotations

import contextlib
import gc
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import errseg
from errseg import ops
from errseg.errors import ErrSegError
from errseg.model.config import CONFIGS, ClipConfig, DecoderConfig, TextConfig, VisionConfig
from errseg.testing.inputs import random_decoder_weights, random_features, random_target, random_text_embeddings
from errseg.verify.checkout import OfficialCode, load_official
from errseg.verify.checks import Check, compare_errors, compare_exactly, compare_labels, failed, vote_bounds
from errseg.verify.golden import VANISHING
from errseg.verify.rows import Row, dtype_name

WORDS = ("a", "cat", "sofa", "traffic light", "swimming pool", "wall-concrete", "tree", "sky", "person")


@dataclass(frozen=True)
class Setting:
    """Sizes at which both run: a map of `side` at 1/16, K of T classes, a label map or target of `output`."""

    name: str
    clip: ClipConfig
    decoder: DecoderConfig
    side: tuple[int, int]
    num_selected: int
    words: int
    output: tuple[int, int]
    batch: int = 1
    float64: bool = True
    gigabytes: float = 0.0  # of a training step in float32


_DIMS = (16, 32, 512, 1024)  # the published tower fixes its last two widths
SMALL_CLIP = ClipConfig(
    embed_dim=40,
    vision=VisionConfig(depths=(1, 1, 2, 1), dims=_DIMS),
    text=TextConfig(width=32, heads=2, layers=2),
    image_size=128,
)
SMALL_DECODER = DecoderConfig(
    text_dim=40,
    guidance_channels=_DIMS,
    width=32,
    num_layers=3,
    mlp_dim=96,
    embed_dim=24,
    guidance_dim=48,
    decoder_guidance=(8, 8, 8),
    decoder_dims=(16, 8, 8),
)
SMALL = Setting("small", SMALL_CLIP, SMALL_DECODER, (8, 6), 5, 13, (101, 77), batch=2)
SMALL_SQUARE = replace(SMALL, name="small, square", side=(10, 10), num_selected=7, words=40)
_BASE, _LARGE = CONFIGS["errseg-b"], CONFIGS["errseg-l"]
PUBLISHED = {
    "evaluation": (
        Setting("B 640, K 48, T 847", _BASE.clip, _BASE.decoder, (40, 40), 48, 847, (512, 683), gigabytes=2.5),
        Setting("L 768, K 48, T 847", _LARGE.clip, _LARGE.decoder, (48, 48), 48, 847, (512, 683), gigabytes=3.5),
    ),
    "training": (
        Setting("B 320, K 32, T 171", _BASE.clip, _BASE.decoder, (20, 20), 32, 171, (320, 320), gigabytes=2.0),
        Setting("B 640, K 32, T 171", _BASE.clip, _BASE.decoder, (40, 40), 32, 171, (640, 640), gigabytes=6.0),
        Setting("L 768, K 32, T 171", _LARGE.clip, _LARGE.decoder, (48, 48), 32, 171, (768, 768), gigabytes=8.5),
    ),
}


def run_official(
    checkout: Path, *, quick: bool, device: torch.device, progress: Callable[[int, int, str], object]
) -> list[Row]:
    """Rows of the comparison with a checkout; `quick` leaves out the published sizes."""
    code = load_official(checkout)
    tasks: list[tuple[str, Setting, float, Callable[[torch.dtype], list[Check]]]] = []
    for what, compare in (("evaluation", _evaluation), ("training", _training)):
        settings = (SMALL, SMALL_SQUARE, *(() if quick else PUBLISHED[what]))
        tasks += [(f"decoder, {what}", s, s.gigabytes, partial(compare, code, s, device)) for s in settings]
    towers = (SMALL, replace(SMALL, name="small, mlp head", clip=_with_mlp_head()))
    full = () if quick else PUBLISHED["evaluation"]
    tasks += [("image tower", s, s.gigabytes, partial(_image_tower, code, s, device)) for s in (*towers, *full)]
    tasks += [("text tower", s, s.gigabytes, partial(_text_tower, code, s, device)) for s in (SMALL, *full)]
    tasks += [("whole model", s, s.gigabytes, partial(_whole_model, code, s, device)) for s in (SMALL, *full[:1])]
    rows: list[Row] = []
    for done, (what, setting, gigabytes, run) in enumerate(tasks):
        for dtype in (torch.float64, torch.float32):
            row = Row("official", "default", dtype_name(dtype), f"{what}: {setting.name}", device=device.type)
            progress(done, len(tasks), f"{row.case} in {row.dtype}")
            rows.append(_run(row, partial(run, dtype), gigabytes, device))
    progress(len(tasks), len(tasks), "")
    return rows


def _run(row: Row, call: Callable[[], list[Check]], gigabytes: float, device: torch.device) -> Row:
    from errseg.verify.runner import free_gigabytes

    gc.collect()
    started, free = time.perf_counter(), free_gigabytes(device)
    # Float32 rows need float64 too: it is what both are measured against.
    if 2 * gigabytes > 0.85 * free:
        return replace(row, reason=f"needs {2 * gigabytes:.1f} GB, {free:.1f} GB are free")
    try:
        row = replace(row, checks=tuple(call()))
    except ErrSegError as error:
        row = replace(row, reason=str(error))
    except Exception as error:  # whatever either side raises ends the row, not the run
        row = replace(row, reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], crashed=True)
    return replace(row, seconds=time.perf_counter() - started)


# ---- both sides of the decoder


class Answer(NamedTuple):
    """What a decoder made: logits of its classes, the dense map where it is the published one, gradients."""

    class_ids: Tensor
    logits: Tensor
    dense: Tensor | None = None
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = {}


def _inputs(setting: Setting, dtype: torch.dtype, device: torch.device) -> tuple[errseg.DenseFeatures, Tensor]:
    text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2)
    features = random_features(
        setting.decoder, setting.batch, *setting.side, seed=3, text_embeddings=text, num_present=5
    )
    # At exactly 16 the clamp has two subgradients, and the two codes choose differently.
    inside = (t.where(t.abs() != 16, t * 0.96875) for t in features)
    return errseg.DenseFeatures(*(t.to(device, dtype) for t in inside)), text.to(device, dtype)


def _weights(setting: Setting, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return random_decoder_weights(setting.decoder, seed=1, dtype=dtype, device=device)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
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


def _official_answer(
    code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device, target: Tensor | None = None
) -> Answer:
    """The published decoder on the setting's inputs; with a target, loss and gradients as well."""
    features, text = _inputs(setting, dtype, device)
    weights = _weights(setting, dtype, device)
    with _default_dtype(dtype), torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = code.decoder(setting.decoder, setting.num_selected).to(device)
        decoder.load_state_dict(weights)
        decoder.train(target is not None)
        seen: dict[str, Tensor] = {}
        select, head = decoder.select_classes, decoder.head.forward

        def selected(*args: Any, **kwargs: Any) -> Tensor:
            seen["ids"] = select(*args, **kwargs)
            return seen["ids"]

        def scored(x: Tensor) -> Tensor:
            seen["logits"] = head(x)  # the published code goes on in float32
            return seen["logits"]

        leaves = [t.requires_grad_(target is not None) for t in (*features, text)]
        os4, os8, os16, os32 = (t.clone() for t in features[:4])  # they are clamped in place
        repeated = text[None, :, None].repeat(setting.batch, 1, 1, 1)
        truth = None if target is None else [t.unique()[t.unique() != 255] for t in target]
        with (
            patch.object(decoder, "select_classes", selected),
            patch.object(decoder.head, "forward", scored),
            torch.set_grad_enabled(target is not None),
        ):
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
        sem_seg_head=_Head(lambda *args: dense, lambda image, dense: {"clip_vis_dense": image}),
    )
    image = torch.zeros(3, 32, 32, device=dense.device)
    inputs = [{"image": image, "sem_seg": t} for t in target]
    # The published loss is in float32 whatever comes; float64 is to stay.
    with patch.object(Tensor, "float", lambda t: t.to(dense.dtype)):
        return code.forward(model, inputs)["loss_sem_seg_0"]


class _Head:
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

    features, text = _inputs(setting, dtype, device)
    decoder = errseg.Decoder.from_published(_weights(setting, dtype, device)).eval()
    leaves = [t.requires_grad_(target is not None) for t in (*features, text)]
    with torch.set_grad_enabled(target is not None):
        output = decoder(features, text, num_selected=setting.num_selected, class_ids=class_ids)
    if target is None:
        return Answer(class_ids, output.logits)
    loss = ops.upsample_bce(output.logits, class_ids, target, vocabulary_size=setting.words)
    names = [published_name(name) for name, _ in decoder.named_parameters()]
    grads = torch.autograd.grad(loss, [output.logits, *leaves, *decoder.parameters()], allow_unused=True)
    return Answer(class_ids, output.logits.detach(), None, loss.detach(), _named(grads, names))


def _evaluation(code: OfficialCode, setting: Setting, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Selected classes, logits per class, label map."""
    theirs = _official_answer(code, setting, dtype, device)
    exact = theirs if dtype == torch.float64 else None
    found = _compare_selection(setting, theirs.class_ids, None, dtype, device)
    ours = _our_answer(setting, theirs.class_ids, dtype, device)
    if exact is None:
        exact = _exact_logits(code, setting, theirs.class_ids, device)
    found += compare_errors("logits", ours.logits, theirs.logits, exact.logits)
    if dtype == torch.float32 and theirs.dense is not None:
        labels = ops.upsample_argmax(ours.logits, theirs.class_ids, setting.output)
        assert isinstance(labels, Tensor)
        apart = (ours.logits - theirs.logits).abs().max().item()
        found.append(_compare_label_maps(labels, theirs.dense, ours.logits, theirs.class_ids, apart))
    return found


def _exact_logits(code: OfficialCode, setting: Setting, class_ids: Tensor, device: torch.device) -> Answer:
    """The published logits in float64 for given classes."""
    with patch.object(code.decoder_module.Decoder, "select_classes", lambda *args, **kwargs: class_ids):
        return _official_answer(code, setting, torch.float64, device)


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
    features, text = _inputs(setting, dtype, device)
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


def _training(code: OfficialCode, setting: Setting, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Selection with ground truth, loss, and gradients of logits, features, text and every parameter."""
    target = random_target(setting.batch, *setting.output, min(setting.words, 6), seed=4).to(device)
    required = torch.stack([_membership(t.unique()[t.unique() != 255], setting.words) for t in target])
    theirs = _official_answer(code, setting, dtype, device, target)
    found = _compare_selection(setting, theirs.class_ids, required, dtype, device)
    ours = _our_answer(setting, theirs.class_ids, dtype, device, target)
    exact = theirs
    if dtype != torch.float64:
        with patch.object(code.decoder_module.Decoder, "select_classes", lambda *args, **kwargs: theirs.class_ids):
            exact = _official_answer(code, setting, torch.float64, device, target)
    assert ours.loss is not None and theirs.loss is not None and exact.loss is not None
    found += compare_errors("logits", ours.logits, theirs.logits, exact.logits)
    found += compare_errors("loss", ours.loss, theirs.loss, exact.loss)
    scale = max(grad.abs().max().item() for name, grad in exact.gradients.items() if name not in ("logits",))
    for name, grad in exact.gradients.items():
        if name not in ours.gradients:
            found.append(failed(f"grad {name}", "no gradient"))
        elif name.endswith(VANISHING):
            size = ours.gradients[name].abs().max().item()
            found.append(Check(f"grad {name}", "absolute", size, torch.finfo(dtype).eps * scale))
        else:
            # Long sums in another order: float32's own error there is a matter of luck.
            found += compare_errors(f"grad {name}", ours.gradients[name], theirs.gradients[name], grad, roundings=64)
    return found


# ---- towers


def _with_mlp_head() -> ClipConfig:
    vision = replace(SMALL_CLIP.vision, head="mlp", dims=(16, 32, 768, 1536))
    return replace(SMALL_CLIP, vision=vision)


def _random_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights that leave no part idle: layer scales near 1/2, uneven norms, products of about unit variance."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("gamma"):
            values = 0.5 + 0.1 * noise
        elif tensor.ndim < 2:
            values = (1 + 0.2 * noise) if name.endswith("weight") else 0.1 * noise
        else:
            # Text projections are applied as x @ W; everything else has its inputs behind the first axis.
            fan_in = tensor.shape[0] if name == "text_projection" else tensor[0].numel()
            embedding = "embedding" in name
            values = noise * (0.3 if embedding else fan_in**-0.5)
        state[name] = values.bfloat16().float()
    return state


def _towers(
    code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device
) -> tuple[errseg.DenseCLIP, Any]:
    """Both CLIPs with the same weights."""
    with torch.device("meta"):
        ours, theirs = errseg.DenseCLIP(setting.clip), code.clip(setting.clip)
    state = _random_state(ours)
    # Buffers that no checkpoint holds (the causal mask) are not made on "meta".
    theirs = theirs.to_empty(device=device)
    theirs.register_buffer("attn_mask", _causal_mask(setting.clip.text.context_length, device), persistent=False)
    ours = ours.to_empty(device=device)
    for tower in (ours, theirs):
        tower.load_state_dict(state)
        tower.to(dtype).eval()
    return ours, theirs


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.full((length, length), float("-inf"), device=device).triu(1)


def _picture_size(setting: Setting) -> tuple[int, int]:
    return 16 * setting.side[0], 16 * setting.side[1]


def _image(setting: Setting, dtype: torch.dtype, device: torch.device) -> Tensor:
    noise = torch.randn(setting.batch, 3, *_picture_size(setting), generator=torch.Generator().manual_seed(6))
    return noise.bfloat16().to(device, dtype)


def _image_tower(code: OfficialCode, setting: Setting, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """All six dense maps; at small sizes the gradients of the picture and of every parameter as well."""
    small = setting.side[0] < 20
    answers = {}
    for kind in {dtype, torch.float64}:
        answers[kind] = _tower_answers(code, setting, kind, device, small)
    found: list[Check] = []
    (ours, theirs), exact = answers[dtype], answers[torch.float64][1]
    for name, value in exact.items():
        roundings = 64 if name.startswith("grad") else 4
        found += compare_errors(name, ours[name], theirs[name], value, roundings=roundings)
    return found


def _tower_answers(
    code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device, gradients: bool
) -> list[dict[str, Tensor]]:
    ours, theirs = _towers(code, setting, dtype, device)
    answers = []
    for tower in (ours, theirs):
        image = _image(setting, dtype, device).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            maps = ours(image)._asdict() if tower is ours else theirs.encode_image(image, dense=True)
        if "clip_vis_dense" in maps:
            maps["os32_dense"] = maps.pop("clip_vis_dense")
        answer = {name: value.detach() for name, value in maps.items()}
        if gradients:
            generator = torch.Generator().manual_seed(8)
            total = image.new_zeros(())
            for name in sorted(maps):
                cotangent = torch.randn(maps[name].shape, generator=generator).bfloat16().to(maps[name])
                total = total + (maps[name] * cotangent).sum()
            parameters = dict(tower.visual.named_parameters())
            grads = torch.autograd.grad(total, [image, *parameters.values()])
            answer |= dict(zip(("grad image", *(f"grad {name}" for name in parameters)), grads, strict=True))
        answers.append(answer)
    return answers


def _text_tower(code: OfficialCode, setting: Setting, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Tokens, and embeddings of prompts cut to their length against all 77 tokens."""
    answers = {}
    for kind in {dtype, torch.float64}:
        ours, theirs = _towers(code, setting, kind, device)
        prompt = _BASE.prompt
        tokens = code.tokenizer_module.tokenize([prompt.replace("{}", word) for word in WORDS]).to(device)
        with torch.no_grad():
            embedded = ours.embed_words(WORDS, prompt=prompt)
            published = theirs.encode_text(tokens)
            published = published / published.norm(dim=-1, keepdim=True)
        answers[kind] = embedded, published
    mine = ours.tokenizer.tokenize([prompt.replace("{}", word) for word in WORDS]).to(device)
    found = [compare_exactly("tokens", mine, tokens.to(mine.dtype))]
    return found + compare_errors("embeddings", *answers[dtype], answers[torch.float64][1], roundings=4)


# ---- all of it


class Picture(NamedTuple):
    """What the published model makes of a picture: ids and logits of its classes, scores [T, H, W] in float32."""

    class_ids: Tensor
    logits: Tensor
    scores: Tensor


def _whole_model(code: OfficialCode, setting: Setting, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Picture and words in, label map out: the published model's own forward pass in evaluation."""
    theirs = _official_picture(code, setting, dtype, device)
    exact = theirs.logits
    if dtype != torch.float64:
        with patch.object(code.decoder_module.Decoder, "select_classes", lambda *args, **kwargs: theirs.class_ids):
            exact = _official_picture(code, setting, torch.float64, device).logits
    text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2).to(device, dtype)
    clip, _ = _towers(code, setting, dtype, device)
    decoder = errseg.Decoder.from_published(_weights(setting, dtype, device)).eval()
    with torch.no_grad():
        features = clip(_normalized(_pixels(setting, device)[None], dtype))
        output = decoder(features, text, num_selected=setting.num_selected, class_ids=theirs.class_ids)
        ids = ops.select_classes(ops.class_votes(features.os16_dense, text), setting.num_selected)
    # A random network amplifies the rounding of every layer before, in both.
    found = compare_errors("logits", output.logits, theirs.logits, exact, roundings=32)
    shared = len(set(ids[0].tolist()) & set(theirs.class_ids[0].tolist()))
    found = [replace(check, note=f"{shared} of {ids.shape[1]} classes shared") for check in found]
    labels = ops.upsample_argmax(output.logits.float(), theirs.class_ids, setting.output)
    assert isinstance(labels, Tensor)
    expected = theirs.scores.argmax(0).to(labels.dtype)[None]
    apart = (output.logits - theirs.logits).abs().max().item()
    same = compare_labels(labels, expected, output.logits.float(), theirs.class_ids, slack=0.5 * apart, twins=False)
    return [*found, same]


def _official_picture(code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device) -> Picture:
    from errseg.model.errseg import MEAN, STD

    text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2).to(device, dtype)
    image = _pixels(setting, device).to(dtype)
    seen: dict[str, Tensor] = {}
    _, clip = _towers(code, setting, dtype, device)
    weights = _weights(setting, dtype, device)
    with _default_dtype(dtype), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        decoder = code.decoder(setting.decoder, setting.num_selected).to(device).eval()
        decoder.load_state_dict(weights)
        select, head = decoder.select_classes, decoder.head.forward

        def selected(*args: Any, **kwargs: Any) -> Tensor:
            seen["ids"] = select(*args, **kwargs)
            return seen["ids"]

        def scored(x: Tensor) -> Tensor:
            seen["logits"] = head(x)
            return seen["logits"]

        def answer(dense: Tensor, projected: list[Tensor], guidances: list[Tensor], truth: Any) -> Tensor:
            return decoder([*projected, dense], text[None, :, None], guidances[::-1], truth)

        model = types.SimpleNamespace(
            training=False,
            device=device,
            clip_pixel_mean=torch.tensor(MEAN, device=device, dtype=dtype).view(-1, 1, 1),
            clip_pixel_std=torch.tensor(STD, device=device, dtype=dtype).view(-1, 1, 1),
            size_divisibility=-1,
            clip_resolution=tuple(image.shape[1:]),
            ignore_value=255,
            sem_seg_head=_Head(answer, clip.encode_image),
        )
        height, width = setting.output
        inputs = [{"image": image, "height": height, "width": width}]
        with patch.object(decoder, "select_classes", selected), patch.object(decoder.head, "forward", scored):
            scores = code.forward(model, inputs)[0]["sem_seg"]
    return Picture(seen["ids"], seen["logits"][None, :, 0], scores)


def _pixels(setting: Setting, device: torch.device) -> Tensor:
    """A picture of noise [3, H, W], 0..255."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (3, *_picture_size(setting)), generator=generator).to(device)


def _normalized(image: Tensor, dtype: torch.dtype) -> Tensor:
    from errseg.model.errseg import MEAN, STD

    mean, std = (torch.tensor(v, dtype=dtype, device=image.device).view(-1, 1, 1) for v in (MEAN, STD))
    return (image.to(dtype) - mean) / std
