"""Both CLIP towers, and the model as a whole, beside the published ones."""

from __future__ import annotations

import types
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import errseg
from errseg import ops
from errseg.model.config import PROMPT, ClipConfig
from errseg.testing.inputs import random_text_embeddings
from errseg.verify.checkout import OfficialCode
from errseg.verify.checks import Check, compare_errors, compare_exactly, compare_labels
from errseg.verify.official_decoder import Head, default_dtype, reordered, same_classes, watched
from errseg.verify.official_settings import Setting, decoder_weights

WORDS = ("a", "cat", "sofa", "traffic light", "swimming pool", "wall-concrete", "tree", "sky", "person")


def random_clip_weights(config: ClipConfig) -> dict[str, Tensor]:
    """Weights that leave no part idle: layer scales near 1/2, uneven norms, products of about unit variance."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in errseg.DenseCLIP(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("gamma"):
            values = 0.5 + 0.1 * noise
        elif len(shape) < 2:
            values = (1 + 0.2 * noise) if name.endswith("weight") else 0.1 * noise
        else:
            # Text projections are applied as x @ W; everything else has its inputs behind the first axis.
            fan_in = shape[0] if name == "text_projection" else shape[1:].numel()
            values = noise * (0.3 if "embedding" in name else fan_in**-0.5)
        state[name] = values.bfloat16().float()
    return state


def _our_clip(setting: Setting, dtype: torch.dtype, device: torch.device) -> errseg.DenseCLIP:
    with torch.device("meta"):
        clip = errseg.DenseCLIP(setting.clip)
    clip = clip.to_empty(device=device)
    clip.load_state_dict(random_clip_weights(setting.clip))
    return clip.to(dtype).eval()


def _their_clip(code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device) -> Any:
    """The published CLIP with the same weights."""
    with torch.device("meta"):
        clip = code.clip(setting.clip)
    # Buffers that no checkpoint holds (the causal mask) are not made on "meta".
    clip = clip.to_empty(device=device)
    clip.register_buffer("attn_mask", _causal_mask(setting.clip.text.context_length, device), persistent=False)
    clip.load_state_dict(random_clip_weights(setting.clip))
    return clip.to(dtype).eval()


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.full((length, length), float("-inf"), device=device).triu(1)


def picture_size(setting: Setting) -> tuple[int, int]:
    """Height and width of a picture whose map at 1/16 has the side of the setting."""
    return 16 * setting.side[0], 16 * setting.side[1]


def _image(setting: Setting, dtype: torch.dtype, device: torch.device) -> Tensor:
    noise = torch.randn(setting.batch, 3, *picture_size(setting), generator=torch.Generator().manual_seed(6))
    return noise.bfloat16().to(device, dtype)


class ModelPair:
    """Both models on one setting; what the published one answers in float64 serves every dtype."""

    def __init__(self, code: OfficialCode, setting: Setting, device: torch.device) -> None:
        self.code, self.setting, self.device = code, setting, device
        self._maps: dict[str, Tensor] | None = None
        self._embeddings: Tensor | None = None
        self._picture: Picture | None = None

    def compare_image_tower(self, dtype: torch.dtype) -> list[Check]:
        """All six dense maps; at small sizes the gradients of the picture and of every parameter as well."""
        gradients = self.setting.side[0] < 20
        ours, theirs = _tower_answers(self.code, self.setting, dtype, self.device, gradients)
        if dtype == torch.float64:
            self._maps = theirs
        if self._maps is None:
            self._maps = _tower_answers(self.code, self.setting, torch.float64, self.device, gradients)[1]
        found: list[Check] = []
        for name, exact in self._maps.items():
            roundings = 64 if name.startswith("grad") else 4
            found += compare_errors(name, ours[name], theirs[name], exact, roundings=roundings)
        return found

    def compare_text_tower(self, dtype: torch.dtype) -> list[Check]:
        """Tokens, and embeddings of prompts cut to their length against all 77 tokens."""
        texts = [PROMPT.replace("{}", word) for word in WORDS]
        tokens = self.code.tokenizer_module.tokenize(texts).to(self.device)
        ours = _our_clip(self.setting, dtype, self.device)
        mine = ours.tokenizer.tokenize(texts).to(self.device)
        with torch.no_grad():
            embedded = ours.embed_words(WORDS, prompt=PROMPT)
        del ours
        theirs = _their_clip(self.code, self.setting, dtype, self.device)
        published = _embed(theirs, tokens)
        if dtype == torch.float64:
            self._embeddings = published
        if self._embeddings is None:
            self._embeddings = _embed(theirs.double(), tokens)
        found = [compare_exactly("tokens", mine, tokens.to(mine.dtype))]
        return found + compare_errors("embeddings", embedded, published, self._embeddings, roundings=4)

    def compare_whole_model(self, dtype: torch.dtype) -> list[Check]:
        """Picture and words in, label map out: the published model's own forward pass in evaluation."""
        setting = self.setting
        theirs = _official_picture(self.code, setting, dtype, self.device)
        if dtype == torch.float64:
            self._picture = theirs
        exact = self._exact_logits(theirs.class_ids)
        text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2).to(self.device, dtype)
        clip = _our_clip(setting, dtype, self.device)
        decoder = errseg.Decoder.from_published(decoder_weights(setting, dtype, self.device)).eval()
        with torch.no_grad():
            features = clip(_normalized(_pixels(setting, self.device)[None], dtype))
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

    def _exact_logits(self, class_ids: Tensor) -> Tensor:
        """The published logits in float64 for these classes, in this order."""
        if self._picture is None or not same_classes(self._picture.class_ids, class_ids):
            with patch.object(self.code.decoder_module.Decoder, "select_classes", lambda *args, **kwargs: class_ids):
                self._picture = _official_picture(self.code, self.setting, torch.float64, self.device)
        return reordered(self._picture.logits, self._picture.class_ids, class_ids)


def _embed(tower: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        published = tower.encode_text(tokens)
    return published / published.norm(dim=-1, keepdim=True)


def _tower_answers(
    code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device, gradients: bool
) -> list[dict[str, Tensor]]:
    answers = []
    for make in (_our_clip, partial(_their_clip, code)):
        tower: Any = make(setting, dtype, device)
        image = _image(setting, dtype, device).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            maps = tower(image)._asdict() if make is _our_clip else tower.encode_image(image, dense=True)
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


class Picture(NamedTuple):
    """What the published model makes of a picture: ids and logits of its classes, scores [T, H, W] in float32."""

    class_ids: Tensor
    logits: Tensor
    scores: Tensor


def _official_picture(code: OfficialCode, setting: Setting, dtype: torch.dtype, device: torch.device) -> Picture:
    from errseg.model.errseg import MEAN, STD

    text = random_text_embeddings(setting.words, setting.decoder.text_dim, seed=2).to(device, dtype)
    image = _pixels(setting, device).to(dtype)
    clip = _their_clip(code, setting, dtype, device)
    weights = decoder_weights(setting, dtype, device)
    with default_dtype(dtype), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        decoder = code.decoder(setting.decoder, setting.num_selected).to(device).eval()
        decoder.load_state_dict(weights)

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
            sem_seg_head=Head(answer, clip.encode_image),
        )
        height, width = setting.output
        inputs = [{"image": image, "height": height, "width": width}]
        with watched(decoder) as seen:
            scores = code.forward(model, inputs)[0]["sem_seg"]
    return Picture(seen["ids"], seen["logits"][None, :, 0], scores)


def _pixels(setting: Setting, device: torch.device) -> Tensor:
    """A picture of noise [3, H, W], 0..255."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (3, *picture_size(setting)), generator=generator).to(device)


def _normalized(image: Tensor, dtype: torch.dtype) -> Tensor:
    from errseg.model.errseg import MEAN, STD

    mean, std = (torch.tensor(v, dtype=dtype, device=image.device).view(-1, 1, 1) for v in (MEAN, STD))
    return (image.to(dtype) - mean) / std
