"""Pictures and words in, label maps out."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from errseg.data.loader import default_workers
from errseg.errors import ErrSegError
from errseg.graphs import GraphCache
from errseg.memory import keep_freed_memory
from errseg.model.decoder import DecoderOutput
from errseg.model.errseg import ERRSeg
from errseg.pipeline import Offer, OnError, Pipeline
from errseg.segmentation import Segmentation
from errseg.settings import (
    DTYPES,
    check_num_selected,
    check_options,
    check_prompt,
    check_size,
    default_dtype,
    default_num_selected,
    find_device,
    find_model,
    memory_advice,
)
from errseg.timing import StageClock, wait_for
from errseg.vocabulary import Progress, Vocabulary

Words = Vocabulary | Sequence[str | Sequence[str]] | Mapping[str, Sequence[str]]

BACKGROUND = "background"
_CACHED_VOCABULARIES = 4
_FINGERPRINT_SAMPLES = 1024
_ENCODE_WORDS = 8192  # tokenised at a time
_UPLOAD_ROWS = 16_384


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
        dtype: torch.float32, torch.bfloat16 or torch.float16; by default bfloat16 on GPUs that have it, else float32.

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
        self.device = find_device(device, model)
        self.model = find_model(model, weights)
        self.num_selected = check_num_selected(num_selected)
        self.size = check_size(self.model.config.size if size is None else size)
        self.prompt = check_prompt(self.model.config.prompt if prompt is None else prompt)
        self.weights_key = _fingerprint(self.model.clip)  # before rounding to another dtype
        if dtype is not None and dtype not in DTYPES.values():
            raise ErrSegError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
        if dtype is None and isinstance(model, str):
            dtype = default_dtype(self.device)
        with memory_advice(self.device):
            self.model.to(device=self.device, dtype=dtype).eval()
        self._network: Callable[..., DecoderOutput] = self.model
        self._offers: OrderedDict[Any, Offer] = OrderedDict()
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

    def optimize(self, *, graphs: bool = True, compile_tower: bool = False, tf32: bool | None = False) -> Segmenter:
        """Make the model as fast as this machine allows, for pictures and words as they are now set up.

        The decoder's weights are composed once, the image tower keeps its maps channels last, and on a CPU the process
        keeps freed memory instead of handing it back. Results agree up to rounding. Weights that change afterwards
        (training, loading, moving to another device) are composed in every call until the next `optimize`. Settings of
        the process stay as they are put.

        Args:
            graphs: on a GPU, capture the network into a CUDA graph when a shape and vocabulary come the second time.
            compile_tower: run the image tower through ``torch.compile``; the first picture takes a minute longer.
            tf32: on a GPU, whether float32 products and convolutions may round their factors to 10 bits, for the whole
                process; None leaves PyTorch's own settings alone, by which convolutions may and products may not.

        Returns:
            this segmenter.
        """
        self.model.clip.visual.to(memory_format=torch.channels_last)
        self.model.decoder.keep_folded()
        if self.device.type == "cpu":
            keep_freed_memory()
        if tf32 is not None and self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.backends.cudnn.allow_tf32 = tf32
        if compile_tower:
            self.model.clip.compile(dynamic=False)
        if graphs and self.device.type == "cuda":
            self._network = GraphCache(self.model, places=self._places)
        return self

    def _places(self) -> tuple[int | None, ...]:
        """Where the weights lie, as they are and composed."""
        return next(self.model.parameters()).data_ptr(), self.model.decoder.rrhc.embedding.place

    def set_vocabulary(
        self,
        words: Words,
        *,
        synonyms: str = "first",
        background: Sequence[str] = (),
        progress: Progress | None = None,
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
        progress: Progress | None = None,
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

    def build_vocabulary(
        self,
        words: Words,
        path: str | PathLike[str],
        *,
        synonyms: str = "first",
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
    ) -> Vocabulary:
        """Encode words straight into a file, and return it memory-mapped: `embed` for up to a million words.

        A block of embeddings is held at a time. Until the file is complete, `path.partial` holds what is done; the
        same call goes on from there.

        Args:
            words: as in `set_vocabulary`; embeddings that they bring are not used.
            path: a .safetensors file, for `Vocabulary.load` and `errseg segment --vocabulary`.
            synonyms: "first" or "mean".
            dtype: of the file: torch.float32, torch.bfloat16 or torch.float16 (half the size).
            progress: called with (words done, words in all).

        Raises:
            ErrSegError: `path` or `path.partial` exists and is of other words, another model, weights, prompt or
                dtype; a word that the model does not know; the file cannot be written.
        """
        _as_vocabulary(words, synonyms).build(
            path,
            self._embed_phrases,
            width=self.model.config.clip.embed_dim,
            dtype=dtype,
            model=self.model.config.name,
            weights=self.weights_key,
            prompt=self.prompt,
            progress=progress,
        )
        return Vocabulary.load(path)

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
                offered, else one more after the last. Words offered as well count as background; those that
                are not are added to a copy of the embeddings.
            threshold: pixels whose probability is below it, in [0, 1], become unknown (-1).
            return_scores: fill `Segmentation.scores`.
            protocol: None squeezes the picture straight to S x S; "published" resizes its shortest edge to 800
                (at most 1333) with Pillow first, as the benchmarks do.
            batch_size: pictures that go through the network at once; by default `default_batch_size`.
            timings: fill `Segmentation.timings`; waits for the GPU after each stage.

        Raises:
            ErrSegError: a bad picture or argument, no vocabulary, or out of memory.
        """
        many = isinstance(images, list | tuple)
        pictures = list(images) if many else [images]
        results = list(
            self.stream(
                pictures,
                workers=min(default_workers(), len(pictures)) if len(pictures) > 1 else 0,
                vocabulary=vocabulary,
                num_selected=num_selected,
                background=background,
                threshold=threshold,
                return_scores=return_scores,
                protocol=protocol,
                batch_size=batch_size,
                timings=timings,
            )
        )
        return results if many else results[0]

    def stream(
        self,
        images: Iterable[Any],
        *,
        workers: int | None = None,
        on_error: OnError | None = None,
        vocabulary: Words | None = None,
        num_selected: int | None = None,
        background: Sequence[str] = (),
        threshold: float | None = None,
        return_scores: bool = False,
        protocol: str | None = None,
        batch_size: int | None = None,
        timings: bool = False,
    ) -> Generator[Segmentation, None, None]:
        """Segment any number of pictures, of any sizes, and yield the results in their order.

        Workers read and resize pictures while the network is busy with others. Memory does not grow with their
        number: at most `workers` + `batch_size` pictures wait, and two batches are under way. Words and settings
        are those of the moment of the call.

        Args:
            images: pictures as in a call, taken one by one as they are needed.
            workers: threads that read and resize; by default one per processor core, at most 16; 0 reads in the
                caller's thread.
            on_error: called with a picture that cannot be read, or not be segmented, and the ErrSegError; the rest
                goes on. By default the error is raised.
            vocabulary, num_selected, background, threshold, return_scores, protocol, batch_size, timings: as in a
                call; the seconds of reading and resizing are those of the workers.

        Raises:
            ErrSegError: as a call.
        """
        check_options(threshold, protocol, batch_size, workers)
        offer = self._find_offer(vocabulary, _as_background(background))
        k = check_num_selected(num_selected) or self.num_selected or self.model.config.num_selected
        pipeline = Pipeline(
            model=self.model,
            network=self._network,
            offer=offer,
            device=self.device,
            size=self.size,
            num_selected=min(k or default_num_selected(len(offer.words)), len(offer.embeddings)),
            batch_size=batch_size or self.default_batch_size,
            threshold=threshold,
            return_scores=return_scores,
            protocol=protocol,
            clock=StageClock(self.device, self.model) if timings else None,
            text_seconds=self.take_text_seconds,
        )
        return pipeline.run(images, default_workers() if workers is None else workers, on_error)

    def take_text_seconds(self) -> float:
        """Seconds spent on text since last asked: the words are encoded once, not once per picture."""
        seconds, self._text_seconds = self._text_seconds, 0.0
        return seconds

    def _find_offer(self, words: Words | None, background: tuple[str, ...]) -> Offer:
        vocabulary = self._vocabulary if words is None else _as_vocabulary(words)
        if vocabulary is None:
            raise ErrSegError("no words to look for: call set_vocabulary first, or pass vocabulary=")
        return self._offer(vocabulary, background)

    def _offer(
        self,
        vocabulary: Vocabulary,
        background: tuple[str, ...],
        progress: Progress | None = None,
    ) -> Offer:
        """The embeddings of words and background words, from the cache if they were lately in use."""
        # Given embeddings are known by their vocabulary, encoded ones by their words.
        key = (vocabulary if vocabulary.embeddings is not None else vocabulary.key, background)
        if key not in self._offers:
            plain = self._offer(vocabulary, (), progress) if background else None
            start = time.perf_counter()
            with memory_advice(self.device):
                self._offers[key] = (
                    Offer(self._embeddings(vocabulary, progress), None, vocabulary.words)
                    if plain is None
                    else self._with_background(plain, background)
                )
            wait_for(self.device)
            self._text_seconds += time.perf_counter() - start
            if len(self._offers) > _CACHED_VOCABULARIES:
                self._offers.popitem(last=False)
        self._offers.move_to_end(key)
        return self._offers[key]

    def _embeddings(self, vocabulary: Vocabulary, progress: Progress | None = None) -> Tensor:
        if vocabulary.embeddings is None:
            return self._encode(vocabulary, progress)
        width, config = vocabulary.embeddings.shape[1], self.model.config
        if width != config.clip.embed_dim:
            raise ErrSegError(f"the embeddings are {width} wide, {config.name} needs {config.clip.embed_dim}")
        vocabulary.check_model(config.name, self.weights_key, self.prompt)
        return _place(vocabulary.embeddings, self.device, self.dtype)

    def _encode(self, vocabulary: Vocabulary, progress: Progress | None = None) -> Tensor:
        return vocabulary.encode(partial(self._embed_phrases, progress=progress))

    @torch.no_grad()
    def _embed_phrases(self, phrases: list[str], progress: Progress | None = None) -> Tensor:
        """[N, D] by the text tower, a few thousand phrases at a time: their tokens would take more than they do."""
        embed = partial(self.model.clip.embed_words, prompt=self.prompt)
        report = progress or (lambda done, total: None)
        rows = torch.empty(len(phrases), self.model.config.clip.embed_dim, device=self.device, dtype=self.dtype)
        with memory_advice(self.device):
            for start in range(0, len(phrases), _ENCODE_WORDS):
                some = phrases[start : start + _ENCODE_WORDS]

                def advance(done: int, _: int, start: int = start) -> object:
                    return report(start + done, len(phrases))

                rows[start : start + len(some)] = embed(some, progress=advance)
        return rows

    def _with_background(self, offer: Offer, background: tuple[str, ...]) -> Offer:
        """The same words with background words added and told apart from the rest."""
        extra = Vocabulary(background).words
        words = background_included(offer.words)
        label = words.index(BACKGROUND)
        known, wanted = set(offer.words), {*extra, BACKGROUND}
        fresh = [word for word in dict.fromkeys(extra) if word not in known]
        labels = [label if word in wanted else i for i, word in enumerate(offer.words)] + [label] * len(fresh)
        embeddings = offer.embeddings
        if fresh:
            embeddings = torch.cat([embeddings, self._encode(Vocabulary(fresh)).to(embeddings.dtype)])
        return Offer(embeddings, torch.tensor(labels, dtype=torch.int32, device=self.device), words)


def background_included(words: list[str]) -> list[str]:
    """The vocabulary of results where some words count as background: that word too, last unless it was offered."""
    return words if BACKGROUND in words else [*words, BACKGROUND]


def _as_vocabulary(words: Words, synonyms: str = "first") -> Vocabulary:
    return words if isinstance(words, Vocabulary) else Vocabulary(words, synonyms=synonyms)


def _as_background(words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str):
        raise ErrSegError(f"background: expected a list of words, got {words!r}")
    return tuple(words)


def _place(embeddings: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The embeddings where they are needed: on a CPU in place, whatever their dtype; on a GPU once, at most as wide."""
    if device.type == "cpu":
        return embeddings.to(device)
    if embeddings.element_size() <= dtype.itemsize:
        dtype = embeddings.dtype
    placed = torch.empty(embeddings.shape, device=device, dtype=dtype)
    for there, here in zip(placed.split(_UPLOAD_ROWS), embeddings.split(_UPLOAD_ROWS), strict=True):
        there.copy_(here)  # by the slice: a change of dtype copies on the CPU first
    return placed


def _fingerprint(clip: nn.Module) -> str:
    """Digest of samples of every parameter of the text tower: tells weights apart in milliseconds."""
    digest = hashlib.sha256()
    for name, value in clip.state_dict().items():
        if not name.startswith("visual."):
            samples = value.flatten()[:: max(1, value.numel() // _FINGERPRINT_SAMPLES)]
            digest.update(name.encode() + samples.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
