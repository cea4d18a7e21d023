"""Pictures through the network: loaded ahead, launched by the batch, and brought back as label maps, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from errseg import ops
from errseg.data.loader import LoadedImage, in_order, load_image
from errseg.errors import ErrSegError
from errseg.model.decoder import DecoderOutput
from errseg.model.errseg import ERRSeg
from errseg.segmentation import Segmentation
from errseg.settings import memory_advice
from errseg.timing import StageClock

OnError = Callable[[Any, ErrSegError], object]  # (picture as it was given, what is wrong with it)


class Offer(NamedTuple):
    """What a picture is compared with: embeddings [N, D], the label of each row (None: its own), the words."""

    embeddings: Tensor
    label_of: Tensor | None
    words: list[str]


class _Launched(NamedTuple):
    """A batch on its way: per picture labels, scores and selected labels, there once `ready` has come."""

    batch: list[LoadedImage]
    maps: list[tuple[Tensor, Tensor | None, Tensor]]
    ready: torch.cuda.Event | None


@dataclass
class Pipeline:
    """The settings of one call. `text_seconds` tells what the words took since last asked."""

    model: ERRSeg
    network: Callable[..., DecoderOutput]  # the model, or what replays it
    offer: Offer
    device: torch.device
    size: int
    num_selected: int
    batch_size: int
    threshold: float | None
    return_scores: bool
    protocol: str | None
    clock: StageClock | None
    text_seconds: Callable[[], float]

    def run(self, images: Iterable[Any], workers: int, on_error: OnError | None) -> Generator[Segmentation, None, None]:
        """Yield the results in order; at most `workers` + `batch_size` pictures are held beside them.

        On a GPU the next batch is launched before the results of the last are fetched, so that it never waits.
        """
        launched: deque[_Launched] = deque()
        behind = 1 if self._asynchronous else 0
        with closing(self._batches(images, workers, on_error)) as batches:
            for batch in batches:
                try:
                    with memory_advice(self.device):
                        launched.append(self._launch(batch))
                except ErrSegError as error:
                    if on_error is None:
                        raise
                    for loaded in batch:
                        on_error(loaded.source, error)
                while len(launched) > behind:
                    yield from self._finish(launched.popleft())
        while launched:
            yield from self._finish(launched.popleft())

    @property
    def _asynchronous(self) -> bool:
        return self.device.type == "cuda" and self.clock is None

    def _batches(
        self, images: Iterable[Any], workers: int, on_error: OnError | None
    ) -> Generator[list[LoadedImage], None, None]:
        """Pictures that could be read, `batch_size` at a time."""
        batch: list[LoadedImage] = []
        with closing(in_order(self._load, images, workers=workers, ahead=workers + self.batch_size)) as loading:
            for source, loaded in loading:
                try:
                    batch.append(loaded.result())
                except ErrSegError as error:
                    if on_error is None:
                        raise
                    on_error(source, error)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _load(self, source: Any) -> LoadedImage:
        return load_image(source, self.size, self.protocol, pin=self.device.type == "cuda")

    def _launch(self, batch: list[LoadedImage]) -> _Launched:
        if self.clock is not None:
            self.clock.seconds["read"] += sum(loaded.read_seconds for loaded in batch)
            self.clock.seconds["preprocess"] += sum(loaded.resize_seconds for loaded in batch)
        with self._stage("preprocess"):
            shape = (len(batch), *batch[0].square.shape[1:])
            inputs = torch.empty(shape, dtype=torch.float32, device=self.device)
            for row, loaded in zip(inputs.split(1), batch, strict=True):
                row.copy_(loaded.square, non_blocking=True)
        output = self._forward(inputs)
        maps = []
        for i, loaded in enumerate(batch):
            with self._stage("labels"):
                maps.append(self._label_map(output.logits[i : i + 1], output.class_ids[i : i + 1], loaded.picture))
        ready = torch.cuda.current_stream(self.device).record_event() if self._asynchronous else None
        return _Launched(batch, maps, ready)

    @torch.inference_mode()
    def _forward(self, inputs: Tensor) -> DecoderOutput:
        if self.clock is None:
            return self.network(inputs, self.offer.embeddings, num_selected=self.num_selected)
        with self.clock.watching():  # its stages are those of the model's own modules
            return self.model(inputs, self.offer.embeddings, num_selected=self.num_selected)

    # Not in inference mode: its tensors may not be changed in place later.
    @torch.no_grad()
    def _label_map(
        self, logits: Tensor, class_ids: Tensor, picture: Image.Image
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Labels, scores when asked for, and selected labels of one picture, on their way to the CPU."""
        size = (picture.height, picture.width)
        selected = self._to_cpu(self._labels_of(class_ids[0]))
        if not self.return_scores and self.threshold is None:
            winners = ops.upsample_argmax(logits, class_ids, size)
            assert isinstance(winners, Tensor)
            return self._to_cpu(self._labels_of(winners[0])), None, selected
        winners, scores = ops.upsample_argmax(logits, class_ids, size, return_scores=True)
        labels = self._labels_of(winners[0])
        if self.threshold is not None:
            labels = labels.masked_fill(scores[0] < self.threshold, -1)
        return self._to_cpu(labels), self._to_cpu(scores[0].float()) if self.return_scores else None, selected

    def _labels_of(self, ids: Tensor) -> Tensor:
        return ids if self.offer.label_of is None else self.offer.label_of[ids.long()]

    def _to_cpu(self, values: Tensor) -> Tensor:
        if not self._asynchronous:
            return values.cpu()
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _finish(self, launched: _Launched) -> Iterator[Segmentation]:
        with memory_advice(self.device):
            if launched.ready is not None:
                launched.ready.synchronize()
            results = [self._result(loaded, *maps) for loaded, maps in zip(launched.batch, launched.maps, strict=True)]
        if self.clock is not None:
            self.clock.seconds["text"] += self.text_seconds()
            shares = self.clock.take(len(results))
            for result in results:
                result.timings = dict(shares)
        yield from results

    def _result(self, loaded: LoadedImage, labels: Tensor, scores: Tensor | None, selected: Tensor) -> Segmentation:
        if self._asynchronous:  # pinned memory is scarce: a result does not keep it
            labels, scores = labels.clone(), None if scores is None else scores.clone()
        name = fspath(loaded.source) if isinstance(loaded.source, str | PathLike) else None
        class_ids = selected.long().unique()
        return Segmentation(labels, scores, self.offer.words, class_ids, loaded.picture, name)

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.clock is None else self.clock.stage(name)
