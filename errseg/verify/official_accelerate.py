"""The whole published model beside itself accelerated: loss, gradients of every trained parameter, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import errseg
from errseg.model.config import PROMPT
from errseg.model.decoder import DecoderOutput
from errseg.testing.inputs import random_target
from errseg.verify.checkout import OfficialCode
from errseg.verify.checks import Check, compare_errors
from errseg.verify.official_decoder import Answer, compare_gradients, default_dtype
from errseg.verify.official_model import WORDS, picture_size, random_clip_weights
from errseg.verify.official_settings import Setting, decoder_weights

ROUNDINGS = 256  # a random network amplifies the rounding of every layer before, here of both towers too


class AcceleratedPair:
    """A published model accelerated and restored, built anew for each comparison; its float64 twin is the truth."""

    def __init__(self, code: OfficialCode, setting: Setting, device: torch.device) -> None:
        self.code, self.setting, self.device = code, setting, device

    def compare_training(self, dtype: torch.dtype) -> list[Check]:
        """Loss and gradients of both towers and the decoder, from pictures and label maps."""
        target = random_target(self.setting.batch, *picture_size(self.setting), 4, seed=4)
        records = [{"image": i, "sem_seg": t} for i, t in zip(self._images(), target, strict=True)]
        ours, theirs, exact = self._answers(dtype, records, training=True)
        assert ours.loss is not None and theirs.loss is not None and exact.loss is not None
        loss = compare_errors("loss", ours.loss, theirs.loss, exact.loss, roundings=ROUNDINGS)
        return loss + compare_gradients(ours, theirs, exact, roundings=ROUNDINGS)

    def compare_evaluation(self, dtype: torch.dtype) -> list[Check]:
        """Scores [T, H, W] of a picture at another size."""
        height, width = self.setting.output
        records = [{"image": self._images()[0], "height": height, "width": width}]
        ours, theirs, exact = self._answers(dtype, records, training=False)
        return compare_errors("scores", ours.logits, theirs.logits, exact.logits, roundings=ROUNDINGS)

    def _images(self) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        return torch.randint(0, 256, (self.setting.batch, 3, *picture_size(self.setting)), generator=generator)

    def _answers(self, dtype: torch.dtype, records: list[dict[str, Any]], training: bool) -> tuple[Answer, ...]:
        """The accelerated model's, then for its classes the published one's in this dtype and in float64."""
        model = self._model(dtype).train(training)
        seen: list[DecoderOutput] = []
        hook = errseg.accelerate(model).sem_seg_head.decoder.register_forward_hook(lambda m, a, out: seen.append(out))
        ours = self._answer(model, records, None)
        hook.remove()
        ids = seen[0].class_ids
        theirs = self._answer(errseg.restore(model), records, ids)
        if dtype == torch.float64:
            return ours, theirs, theirs
        return ours, theirs, self._answer(self._model(torch.float64).train(training), records, ids)

    def _model(self, dtype: torch.dtype) -> Any:
        setting = self.setting
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clip = self.code.clip(setting.clip)
            decoder = self.code.decoder(setting.decoder, setting.num_selected)
            model = self.code.model(clip, decoder, list(WORDS), PROMPT, picture_size(self.setting))
        model.sem_seg_head.clip_model.load_state_dict(random_clip_weights(setting.clip))
        decoder.load_state_dict(decoder_weights(setting, dtype, self.device))
        return model.to(self.device, dtype)

    def _answer(self, model: Any, records: list[dict[str, Any]], class_ids: Tensor | None) -> Answer:
        """Of the model as it is; the published one takes `class_ids`."""
        dtype = model.clip_pixel_mean.dtype
        published = contextlib.nullcontext() if class_ids is None else _published(model, class_ids)
        with default_dtype(dtype), _kept(dtype), published, torch.random.fork_rng():
            torch.manual_seed(0)
            if not model.training:
                with torch.no_grad():
                    return Answer(torch.empty(0), model(records)[0]["sem_seg"])
            loss = model(records)["loss_sem_seg_0"]
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found = {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}
        return Answer(torch.empty(0), loss.detach(), None, loss.detach(), found)


@contextlib.contextmanager
def _published(model: Any, class_ids: Tensor) -> Iterator[None]:
    """Give the published decoder its classes, which it would leave to chance, and its tokens on any device."""
    chosen = patch.object(model.sem_seg_head.decoder, "select_classes", lambda *args, **kwargs: class_ids)
    with chosen, patch.object(Tensor, "cuda", lambda t: t.to(class_ids.device)):
        yield


@contextlib.contextmanager
def _kept(dtype: torch.dtype) -> Iterator[None]:
    """Logits, scores and loss are in float32 whatever comes; float64 is to stay."""
    if dtype != torch.float64:
        yield
        return
    ones = torch.ones

    def as_they_are(*args: Any, **kwargs: Any) -> Tensor:
        return ones(*args, **(kwargs | {"dtype": dtype}))

    with patch.object(Tensor, "float", lambda t: t.to(dtype)), patch.object(torch, "ones", as_they_are):
        yield
