"""Pictures and words in, label maps out."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from errseg import ops
from errseg.data.images import read_image
from errseg.errors import ErrSegError
from errseg.model.decoder import DecoderOutput
from errseg.model.errseg import ERRSeg, create_model
from errseg.segmentation import Segmentation
from errseg.timing import StageClock, wait_for
from errseg.vocabulary import Vocabulary

Words = Vocabulary | Sequence[str | Sequence[str]] | Mapping[str, Sequence[str]]

BACKGROUND = "background"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PUBLISHED_WEIGHTS = "lchen1019/ERR-Seg"

# The benchmarks' K for their vocabulary sizes PAS-20, PC-59, COCO-171 and A-150; more words get 48.
_NUM_SELECTED = ((20, 16), (59, 24), (171, 32))
_MOST_SELECTED = 48
_CACHED_VOCABULARIES = 4
_FINGERPRINT_SAMPLES = 1024


def default_num_selected(num_words: int) -> int:
    """K for a vocabulary: 16 up to 20 words, 24 up to 59, 32 up to 171, else 48 (the benchmarks' values)."""
    return next((k for most, k in _NUM_SELECTED if num_words <= most), _MOST_SELECTED)


class _Offer(NamedTuple):
    """What a picture is compared with: embeddings [N, D], the label of each row (None: its own), the words."""

    embeddings: Tensor
    label_of: Tensor | None
    words: list[str]


class Segmenter:
    """Segment pictures by words.

    Args:
        model: "errseg-b", "errseg-l", "errseg-tiny" (a toy world, with its weights), or an ERRSeg, which is moved
            to `device` and `dtype` where those are given and put in evaluation mode.
        weights: as in `create_model`; the published ones are at Hugging Face, `lchen1019/ERR-Seg` (MIT).
        vocabulary: words to offer; see `set_vocabulary`.
        num_selected: K, the words kept per picture; by default `default_num_selected` of the vocabulary's size,
            16 for errseg-tiny.
        size: S, the side of the square that the model sees, a multiple of 32; by default the model's.
        prompt: a sentence with {} for the word; by default the model's.
        device: for example "cpu", "cuda", "cuda:1"; by default a GPU if there is one.
        dtype: torch.float32 (default), torch.bfloat16 or torch.float16.

    Raises:
        ErrSegError: unknown model, bad weights, no such device, a wrong size, prompt or vocabulary.
    """

    def __init__(
        self,
        model: str | ERRSeg,
        weights: str | PathLike[str] | None = None,
        *,
        vocabulary: Words | None = None,
        num_selected: int | None = None,
        size: int | None = None,
        prompt: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = _find_device(device, model)
        self.model = _find_model(model, weights)
        self.num_selected = _check_num_selected(num_selected)
        self.size = _check_size(self.model.config.size if size is None else size)
        self.prompt = _check_prompt(self.model.config.prompt if prompt is None else prompt)
        self.weights_key = _fingerprint(self.model.clip)  # before rounding to another dtype
        if dtype is not None and dtype not in DTYPES.values():
            raise ErrSegError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        if dtype is None and isinstance(model, str):
            dtype = torch.float32
        with _memory_advice(self.device):
            self.model.to(device=self.device, dtype=dtype).eval()
        self._offers: OrderedDict[Any, _Offer] = OrderedDict()
        self._text_seconds = 0.0
        self._vocabulary: Vocabulary | None = None
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary set, if any."""
        return self._vocabulary

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.model.parameters()).dtype

    @property
    def default_batch_size(self) -> int:
        """Pictures that go through the network at once: 4 on a GPU, 1 elsewhere."""
        return 4 if self.device.type == "cuda" else 1

    def set_vocabulary(
        self,
        words: Words,
        *,
        synonyms: str = "first",
        background: Sequence[str] = (),
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Offer these words from now on, and encode them.

        Args:
            words: 1 to 1,000,000 words, {name: [synonyms]}, or a Vocabulary.
            synonyms: "first" or "mean", as in `Vocabulary`, which brings its own.
            background: words to encode along, as later given to a call.
            progress: called with (words done, words in all).

        Raises:
            ErrSegError: as `Vocabulary`; embeddings of another model; words that the model does not know.
        """
        vocabulary = _as_vocabulary(words, synonyms)
        self._offer(vocabulary, _as_background(background), progress)
        self._vocabulary = vocabulary

    def embed(
        self,
        words: Words,
        *,
        synonyms: str = "first",
        progress: Callable[[int, int], object] | None = None,
    ) -> Vocabulary:
        """Return the words with their embeddings, on the CPU, marked with this model, weights and prompt."""
        vocabulary = _as_vocabulary(words, synonyms)
        return Vocabulary(
            vocabulary.synonyms,
            self._encode(vocabulary, progress).cpu(),
            synonyms=vocabulary.rule,
            model=self.model.config.name,
            weights=self.weights_key,
            prompt=self.prompt,
        )

    def __call__(
        self,
        images: Any,
        *,
        vocabulary: Words | None = None,
        num_selected: int | None = None,
        background: Sequence[str] = (),
        threshold: float | None = None,
        return_scores: bool = False,
        protocol: str | None = None,
        batch_size: int | None = None,
        timings: bool = False,
    ) -> Any:
        """Segment one picture (a Segmentation) or a list of them (a list), of any sizes.

        Args:
            images: a path, PIL image, uint8 [H, W, 3] array or tensor, or a list of these (`read_image`).
            vocabulary: words for this call only.
            num_selected: K for this call only.
            background: words whose pixels all get the one label "background": the word of that name if it is
                offered, else one more after the last. Words offered as well count as background.
            threshold: pixels whose probability is below it, in [0, 1], become unknown (-1).
            return_scores: fill `Segmentation.scores`.
            protocol: None squeezes the picture straight to S x S; "published" resizes its shortest edge to 800
                (at most 1333) with Pillow first, as the benchmarks do.
            batch_size: pictures that go through the network at once; by default `default_batch_size`.
            timings: fill `Segmentation.timings`; waits for the GPU after each stage.

        Raises:
            ErrSegError: a bad picture or argument, no vocabulary, or out of memory.
        """
        check_options(threshold, protocol, batch_size)
        batch_size = batch_size or self.default_batch_size
        clock = StageClock(self.device, self.model) if timings else None
        with _memory_advice(self.device):
            offer = self._find_offer(vocabulary, _as_background(background))
            k = _check_num_selected(num_selected) or self.num_selected or self.model.config.num_selected
            k = min(k or default_num_selected(len(offer.words)), len(offer.embeddings))
            run = _Run(self, offer, k, threshold, return_scores, protocol, clock)
            many = isinstance(images, list | tuple)
            sources = list(images) if many else [images]
            results: list[Segmentation] = []
            for start in range(0, len(sources), batch_size):
                results += run.batch(sources[start : start + batch_size])
        return results if many else results[0]

    def take_text_seconds(self) -> float:
        """Seconds spent on text since last asked: the words are encoded once, not once per picture."""
        seconds, self._text_seconds = self._text_seconds, 0.0
        return seconds

    def _find_offer(self, words: Words | None, background: tuple[str, ...]) -> _Offer:
        vocabulary = self._vocabulary if words is None else _as_vocabulary(words)
        if vocabulary is None:
            raise ErrSegError("no words to look for: call set_vocabulary first, or pass vocabulary=")
        return self._offer(vocabulary, background)

    def _offer(
        self,
        vocabulary: Vocabulary,
        background: tuple[str, ...],
        progress: Callable[[int, int], object] | None = None,
    ) -> _Offer:
        """The embeddings of words and background words, from the cache if they were lately in use."""
        # Given embeddings are known by their vocabulary, encoded ones by their words.
        key = (vocabulary if vocabulary.embeddings is not None else vocabulary.key, background)
        if key not in self._offers:
            plain = self._offer(vocabulary, (), progress) if background else None
            start = time.perf_counter()
            with _memory_advice(self.device):
                self._offers[key] = (
                    _Offer(self._embeddings(vocabulary, progress), None, vocabulary.words)
                    if plain is None
                    else self._with_background(plain, background)
                )
            wait_for(self.device)
            self._text_seconds += time.perf_counter() - start
            if len(self._offers) > _CACHED_VOCABULARIES:
                self._offers.popitem(last=False)
        self._offers.move_to_end(key)
        return self._offers[key]

    def _embeddings(self, vocabulary: Vocabulary, progress: Callable[[int, int], object] | None = None) -> Tensor:
        if vocabulary.embeddings is None:
            return self._encode(vocabulary, progress)
        width, config = vocabulary.embeddings.shape[1], self.model.config
        if width != config.clip.embed_dim:
            raise ErrSegError(f"the embeddings are {width} wide, {config.name} needs {config.clip.embed_dim}")
        vocabulary.check_model(config.name, self.weights_key, self.prompt)
        return vocabulary.embeddings.to(self.device, self.dtype)

    @torch.no_grad()
    def _encode(self, vocabulary: Vocabulary, progress: Callable[[int, int], object] | None = None) -> Tensor:
        with _memory_advice(self.device):
            return vocabulary.encode(
                lambda phrases: self.model.clip.embed_words(phrases, prompt=self.prompt, progress=progress)
            )

    def _with_background(self, offer: _Offer, background: tuple[str, ...]) -> _Offer:
        """The same words with background words added and told apart from the rest."""
        extra = Vocabulary(background).words
        label = offer.words.index(BACKGROUND) if BACKGROUND in offer.words else len(offer.words)
        words = offer.words if label < len(offer.words) else [*offer.words, BACKGROUND]
        known, wanted = set(offer.words), {*extra, BACKGROUND}
        fresh = [word for word in dict.fromkeys(extra) if word not in known]
        labels = [label if word in wanted else i for i, word in enumerate(offer.words)] + [label] * len(fresh)
        embeddings = offer.embeddings
        if fresh:
            embeddings = torch.cat([embeddings, self._encode(Vocabulary(fresh))])
        return _Offer(embeddings, torch.tensor(labels, dtype=torch.int32, device=self.device), words)


@dataclass
class _Run:
    """The settings of one call."""

    segmenter: Segmenter
    offer: _Offer
    num_selected: int
    threshold: float | None
    return_scores: bool
    protocol: str | None
    clock: StageClock | None

    def batch(self, sources: list[Any]) -> list[Segmentation]:
        """Pictures of any sizes through the network at once."""
        segmenter = self.segmenter
        with self._stage("read"):
            pictures = [read_image(source) for source in sources]
        with self._stage("preprocess"):
            inputs = torch.cat([to_square(picture, segmenter.size, self.protocol) for picture in pictures])
            inputs = inputs.to(segmenter.device)
        output = self._forward(inputs)
        results = []
        for i, (source, picture) in enumerate(zip(sources, pictures, strict=True)):
            with self._stage("labels"):
                maps = self._label_map(output.logits[i : i + 1], output.class_ids[i : i + 1], picture)
            # Copied: tensors made in inference mode may not be changed in place.
            labels, scores, class_ids = (None if x is None else x.clone() for x in maps)
            assert labels is not None and class_ids is not None
            name = fspath(source) if isinstance(source, str | PathLike) else None
            results.append(Segmentation(labels, scores, self.offer.words, class_ids, picture, name))
        if self.clock is not None:
            self.clock.seconds["text"] += segmenter.take_text_seconds()
            shares = self.clock.take(len(sources))
            for result in results:
                result.timings = dict(shares)
        return results

    @torch.inference_mode()
    def _forward(self, inputs: Tensor) -> DecoderOutput:
        with nullcontext() if self.clock is None else self.clock.watching():
            return self.segmenter.model(inputs, self.offer.embeddings, num_selected=self.num_selected)

    @torch.inference_mode()
    def _label_map(
        self, logits: Tensor, class_ids: Tensor, picture: Image.Image
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Labels, scores when asked for, and class ids of one picture, on the CPU."""
        size = (picture.height, picture.width)
        ids = self._labels_of(class_ids[0]).long().unique().cpu()
        if not self.return_scores and self.threshold is None:
            winners = ops.upsample_argmax(logits, class_ids, size)
            assert isinstance(winners, Tensor)
            return self._labels_of(winners[0]).cpu(), None, ids
        winners, scores = ops.upsample_argmax(logits, class_ids, size, return_scores=True)
        labels = self._labels_of(winners[0])
        if self.threshold is not None:
            labels = labels.masked_fill(scores[0] < self.threshold, -1)
        return labels.cpu(), scores[0].float().cpu() if self.return_scores else None, ids

    def _labels_of(self, ids: Tensor) -> Tensor:
        return ids if self.offer.label_of is None else self.offer.label_of[ids.long()]

    def _stage(self, name: str) -> Any:
        return nullcontext() if self.clock is None else self.clock.stage(name)


def to_square(picture: Image.Image, size: int, protocol: str | None = None) -> Tensor:
    """Return an RGB picture as [1, 3, size, size] float32, 0..255: bilinear, half-pixel centres, no antialias.

    With "published" the shortest edge first becomes 800 (longest at most 1333) in uint8 by Pillow.
    """
    if protocol == "published":
        scale = min(800 / min(picture.size), 1333 / max(picture.size))
        width, height = (max(1, int(edge * scale + 0.5)) for edge in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture))
    # Channel by channel: a float copy of a large picture takes four times its memory.
    return torch.cat(
        [
            F.interpolate(channel[None, None].float(), size=(size, size), mode="bilinear", align_corners=False)
            for channel in pixels.unbind(-1)
        ],
        dim=1,
    )


def _as_vocabulary(words: Words, synonyms: str = "first") -> Vocabulary:
    return words if isinstance(words, Vocabulary) else Vocabulary(words, synonyms=synonyms)


def _as_background(words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str):
        raise ErrSegError(f"background: expected a list of words, got {words!r}")
    return tuple(words)


def check_options(threshold: float | None, protocol: str | None, batch_size: int | None) -> None:
    """Raise ErrSegError for options of a call that are wrong for any picture."""
    if protocol not in (None, "published"):
        raise ErrSegError(f"protocol: expected 'published' or nothing, got {protocol!r}")
    if batch_size is not None and batch_size < 1:
        raise ErrSegError(f"batch size: expected at least 1, got {batch_size}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ErrSegError(f"threshold: expected a probability from 0 to 1, got {threshold}")


def _find_model(model: str | ERRSeg, weights: str | PathLike[str] | None) -> ERRSeg:
    if not isinstance(model, str):
        if weights is not None:
            raise ErrSegError("weights go with a model's name; this model brings its own")
        return model
    if weights is None and model != "errseg-tiny":
        warnings.warn(
            f"{model} with random weights: give weights= (published: {PUBLISHED_WEIGHTS} at Hugging Face)",
            stacklevel=3,
        )
    return create_model(model, weights)


def _find_device(device: str | torch.device | None, model: str | nn.Module) -> torch.device:
    if device is None:
        if not isinstance(model, str):
            return next(model.parameters()).device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ErrSegError(f"no such device: {device!r}; try cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        reason = "no usable GPU" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
        raise ErrSegError(f"no such device: {device} ({reason}); use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ErrSegError(f"no such device: {device}; there are {torch.cuda.device_count()} GPUs, from cuda:0")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ErrSegError(f"no such device: {device}; try cpu or cuda") from error
    return found


def _check_num_selected(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ErrSegError(f"num_selected: expected at least 1, got {value}")
    return value


def _check_size(value: int) -> int:
    if value < 32 or value % 32:
        raise ErrSegError(f"size: expected a positive multiple of 32, got {value}")
    return value


def _check_prompt(value: str) -> str:
    if value.count("{}") != 1:
        raise ErrSegError(f"prompt: expected a sentence with one {{}} for the word, got {value!r}")
    return value


def _fingerprint(clip: nn.Module) -> str:
    """Digest of samples of every parameter of the text tower: tells weights apart in milliseconds."""
    digest = hashlib.sha256()
    for name, value in clip.state_dict().items():
        if not name.startswith("visual."):
            samples = value.flatten()[:: max(1, value.numel() // _FINGERPRINT_SAMPLES)]
            digest.update(name.encode() + samples.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _memory_advice(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into a line that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ErrSegError(_advice(device)) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise ErrSegError(_advice(device)) from error
        raise


def _advice(device: torch.device) -> str:
    return (
        f"out of memory on {device}: use a smaller batch size, a smaller size, fewer selected words, "
        "dtype bfloat16 or another device"
    )
